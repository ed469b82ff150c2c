"""A saved adapter that cannot be loaded is refused before the model is changed."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from tlora import load_adapter
from tlora.errors import AdapterError, MisfitError


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


@pytest.mark.parametrize("kept", [0, 7, 200, -8])
def test_weights_that_are_cut_off_are_named_and_the_model_stays(folder, kept):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    base = model()
    before = parts(base)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: cut off or damaged"):
        load_adapter(base, folder)
    assert parts(base) == before
