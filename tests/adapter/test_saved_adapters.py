"""A saved adapter that cannot be loaded is refused before the model is changed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tlora import load_adapter
from tlora.errors import AdapterError, ArtifactError, MisfitError
from tlora.files import seal_tensors


def model(d_in: int = 6, d_out: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(d_in, d_out), nn.ReLU(), nn.Linear(d_out, 2))


@pytest.fixture
def folder(tmp_path):
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    get_peft_model(model(), config).save_pretrained(tmp_path)
    return tmp_path


def parts(of: nn.Module) -> list[tuple[str, type, int]]:
    return [(name, type(module), id(module)) for name, module in of.named_modules()]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"d_in": 7}, "0 has 7 in_features, and its lora_A takes 6"),
        ({"d_out": 4}, "0 has 4 out_features, and its lora_B takes 5"),
    ],
)
def test_another_size_is_named_and_the_model_stays(folder, sizes, says):
    other = model(**sizes)
    before = parts(other)
    with pytest.raises(MisfitError, match=f"does not fit this Sequential: {says}; load it onto"):
        load_adapter(other, folder)
    assert parts(other) == before


def test_a_rank_that_is_not_the_saved_one_is_named_with_both_shapes(folder):
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"r": 2', '"r": 3'))
    with pytest.raises(AdapterError) as caught:
        load_adapter(model(), folder)
    assert str(caught.value) == (
        f"{folder}: base_model.model.0.lora_A.default.weight has shape [2, 6] in the file, and"
        " [3, 6] by adapter_config.json (`r`, `rank_pattern`); restore adapter_config.json, or copy"
        " the adapter again."
    )


@pytest.mark.parametrize("kept", [0, 7, 200, -8])
def test_weights_that_are_cut_off_are_named_and_the_model_stays(folder, kept):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    base = model()
    before = parts(base)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: cut off or damaged"):
        load_adapter(base, folder)
    assert parts(base) == before


def test_a_sealed_adapter_loads_with_an_edited_configuration_as_one_without_a_digest_does(folder):
    unsealed = load_adapter(model(), folder).state_dict()
    seal_tensors(folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "mine"}))
    (folder / "README.md").write_text("mine")
    sealed = load_adapter(model(), folder).state_dict()
    lora = [name for name in sealed if "lora_" in name]
    assert len(lora) == 4
    assert all(torch.equal(sealed[name], unsealed[name]) for name in lora)


@pytest.mark.parametrize("place", [0, 0.1, 0.5, 0.9, 1])
def test_a_flipped_bit_of_a_sealed_adapter_is_named_and_the_model_stays(folder, place):
    file = folder / "adapter_model.safetensors"
    seal_tensors(file)
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    base = model()
    before = parts(base)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: cut off or damaged"):
        load_adapter(base, folder)
    assert parts(base) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_and_the_model_stays(folder, value):
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name][0, 0] = value
    save_file(weights, file, {"format": "pt"})
    base = model()
    before = parts(base)
    said = rf"1 of {len(weights)} tensors are not finite \({name}\); train again"
    with pytest.raises(AdapterError, match=said):
        load_adapter(base, folder)
    assert parts(base) == before


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"\xe9", b"[" * 100_000, b'{"peft_type": "NOPE"}', b'{"peft_type": 5}'],
)
def test_a_damaged_configuration_is_named_and_the_model_stays(folder, text):
    (folder / "adapter_config.json").write_bytes(text)
    base = model()
    before = parts(base)
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: "):
        load_adapter(base, folder)
    assert parts(base) == before


@pytest.mark.parametrize(
    "field", [{"r": "x"}, {"r": -1}, {"target_modules": "(("}, {"lora_alpha": []}, {"bias": 7}]
)
def test_a_configuration_that_peft_cannot_use_is_refused_with_its_folder(folder, field):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | field))
    with pytest.raises(AdapterError, match=str(folder)):
        load_adapter(model(), folder)
