"""A configuration that PEFT could not compute with, or that its weights belie, is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from served import change_config, change_weights
from tlora import load_adapter
from tlora.adapter.saved import MAGNITUDE, PREFIX, read_lora
from tlora.errors import AdapterError, ConfigError
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.fixture
def copied(varied, tmp_path):
    """A copy of an adapter."""
    return Path(shutil.copytree(varied.adapter, tmp_path / "adapter"))


def exported(folder, form, out, **fields):
    given = {"path": str(folder), "format": form, "output_dir": str(out)} | fields
    export.run(ExportConfig(**given))
    return out


FIELDS = [
    *({"r": value} for value in (None, 0, -1, "8", 2.5, True)),
    *({"lora_alpha": value} for value in (None, "16", [1], float("nan"), float("inf"))),
    *({"rank_pattern": value} for value in (5, ["q_proj"], {"(": 1}, {"q_proj": 0})),
    *({"alpha_pattern": value} for value in ({"q_proj": None}, {"q_proj": float("nan")})),
    *({"target_modules": value} for value in ("(", 5, [1, 2])),
    {"layers_to_transform": [0], "target_modules": ".*q_proj"},
    {"layers_pattern": "layers", "layers_to_transform": None},
    {"layers_to_transform": "0"},
    {"exclude_modules": "("},
    {"modules_to_save": "lm_head"},
    {"trainable_token_indices": 5},
    {"base_model_name_or_path": 5},
    {"bias": "some"},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_field_that_peft_could_not_compute_with_is_named(copied, fields):
    change_config(copied, **fields)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json has `{next(iter(fields))}"):
        read_lora(copied)


def test_loading_refuses_a_scale_that_is_not_a_number(copied, varied):
    change_config(copied, lora_alpha=float("nan"), alpha_pattern={})
    with pytest.raises(AdapterError, match="which is not a finite number"):
        load_adapter(varied.load().get_base_model(), copied)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_tensors_that_a_field_promises_must_be_there(copied, fields):
    change_config(copied, **fields)
    with pytest.raises(AdapterError, match=next(iter(fields))):
        read_lora(copied)


def test_magnitudes_that_no_field_mentions_are_refused(copied):
    change_weights(copied, lambda w: w.update({Q + MAGNITUDE: w[B][:, 0].clone()}))
    with pytest.raises(AdapterError, match="`use_dora: False`, and 1 tensors"):
        read_lora(copied)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_matrices_that_are_not_floating_point_are_refused(copied, dtype):
    change_weights(copied, lambda w: w.update({A: w[A].to(dtype)}))
    with pytest.raises(AdapterError, match="not in floating point"):
        read_lora(copied)


@pytest.mark.parametrize("dims", [0, 1])
def test_factors_that_are_no_matrices_are_refused(copied, dims):
    change_weights(copied, lambda w: w.update({A: w[A].flatten()[0 if dims == 0 else slice(4)]}))
    with pytest.raises(AdapterError, match="not matrices"):
        read_lora(copied)


def test_a_tensor_that_no_field_mentions_is_not_left_out_in_silence(copied, tmp_path):
    # PEFT saves the embedding beside the matrices where the vocabulary has grown.
    change_weights(copied, lambda w: w.update({f"{PREFIX}model.embed_tokens.weight": w[A].clone()}))
    with pytest.raises(AdapterError, match=r"other tensors \(.*model\.embed_tokens\.weight\)"):
        exported(copied, "gguf", tmp_path / "out")


@pytest.mark.parametrize("form", ["gguf", "merged"])
def test_the_working_folder_is_no_base(copied, varied, form, tmp_path, monkeypatch):
    change_config(copied, base_model_name_or_path=None)
    monkeypatch.chdir(varied.base)
    with pytest.raises((AdapterError, ConfigError), match="does not name its base model"):
        exported(copied, form, tmp_path / "out")


@pytest.mark.parametrize("form", ["uniform", "compact"])
def test_an_update_that_half_precision_loses_is_refused(copied, form, tmp_path):
    change_config(copied, lora_alpha=1e-7, alpha_pattern={})
    with pytest.raises(
        AdapterError, match=r"rounding loses more than 10% of the update of .*_proj"
    ):
        exported(copied, form, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert exported(copied, form, tmp_path / "out", dtype="bfloat16").is_dir()


def test_a_rank_beyond_the_layer_is_cut_to_the_layer(copied, tmp_path):
    change_weights(
        copied, lambda w: w.update({A: w[A][:1].repeat(20, 1), B: w[B][:, :1].repeat(1, 20)})
    )
    before = read_after(copied, {"^model.layers.0.self_attn.q_proj": 20})
    cut = read_lora(exported(copied, "native", tmp_path / "out", max_rank=18))
    name = Q.removeprefix(PREFIX)
    one, other = before.factors(name), cut.factors(name)
    torch.testing.assert_close(other.scale * other.b @ other.a, one.scale * one.b @ one.a)


def read_after(folder, ranks):
    known = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    change_config(folder, rank_pattern=ranks | known)
    return read_lora(folder)


def test_an_adapter_s_own_config_json_is_not_the_merged_model_s(copied, tmp_path):
    (copied / "config.json").write_text('{"model_type": "gpt2"}')
    (copied / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    out = exported(copied, "merged", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert not (out / "model.safetensors.index.json").exists()


def test_a_base_s_link_out_of_its_folder_is_not_copied(copied, varied, tmp_path):
    base = Path(shutil.copytree(varied.base, tmp_path / "base"))
    (tmp_path / "secret.txt").write_text("mine")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(AdapterError, match="is a link out of its folder"):
        exported(copied, "merged", tmp_path / "out", model=str(base))


def test_a_name_that_the_base_lacks_is_an_error_beside_an_embedding_too(copied, tmp_path):
    def change(weights):
        for side in (A, B):
            weights[side.replace("q_proj", "query")] = weights.pop(side)
        weights[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.ones(3, 150)
        weights[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = torch.ones(16, 3)

    change_weights(copied, change)
    ranks = json.loads((copied / "adapter_config.json").read_text())["rank_pattern"]
    targets = ["query", "embed_tokens", "k_proj"]
    change_config(copied, rank_pattern=ranks | {"query": 1}, target_modules=targets)
    with pytest.raises(AdapterError, match=r"self_attn\.query, which .* does not have"):
        exported(copied, "native", tmp_path / "out")
