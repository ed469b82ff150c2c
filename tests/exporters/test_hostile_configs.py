"""A configuration that PEFT could not compute with, or that its weights belie, is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from served import change_config, change_weights
from tlora import load_adapter
from tlora.adapter.saved import PREFIX, read_lora
from tlora.errors import AdapterError
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


@pytest.mark.parametrize("alpha", [float("nan"), 10**400], ids=["nan", "huge"])
def test_loading_refuses_a_scale_that_is_not_a_number(copied, varied, alpha):
    change_config(copied, lora_alpha=alpha, alpha_pattern={})
    with pytest.raises(AdapterError, match="which is not a finite number"):
        load_adapter(varied.load().get_base_model(), copied)


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
