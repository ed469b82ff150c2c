"""The merged model is the adapter on its base, for every kind of thing that an adapter holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from families import DECODER, FAMILIES, Kind
from served import PROMPT, Saved, save
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig


def merged(saved: Saved, folder: Path, **fields: Any) -> Path:
    """Merge an adapter; return the folder."""
    path = str(saved.adapter)
    given = {"path": path, "output_dir": str(folder), "format": "merged"} | fields
    export.run(ExportConfig(**given))
    return folder


def logits(folder: Path, kind: str = "AutoModelForCausalLM") -> torch.Tensor:
    """Return the logits of a merged model, loaded by transformers alone, which finds it whole."""
    model, found = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


def sharded(saved: Saved, size: str = "8KB", **fields: Any) -> Saved:
    """Return the same with a base in several files."""
    folder = saved.base.with_name("sharded")
    kind = transformers.AutoModelForCausalLM
    if not folder.exists():
        kind.from_pretrained(saved.base, **fields).save_pretrained(folder, max_shard_size=size)
    return Saved(folder, saved.adapter)


TIED = Kind(
    "LlamaConfig",
    "LlamaForCausalLM",
    DECODER | {"tie_word_embeddings": True, "attention_bias": True},
)
UNTIED = Kind("LlamaConfig", "LlamaForCausalLM", DECODER | {"attention_bias": True})
KINDS = {
    "head": {"targets": ["q_proj", "lm_head"]},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "both": {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    "both-tied": {"targets": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "embedding-in-full": {"modules_to_save": ["embed_tokens"]},
    "embedding-in-full-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both-in-full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norm-in-full": {"modules_to_save": ["norm"]},
    "rows": {"trainable_token_indices": [1, 17]},
    "biases": {"bias": "all"},
    "own-biases": {"bias": "lora_only"},
    "biases-of-b": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora-embedding": {"targets": ["q_proj", "embed_tokens"], "use_dora": True},
    "rslora": {"use_rslora": True},
}


def trained(kind: Kind, folder: Path, targets: Any = ("q_proj", "o_proj"), **fields: Any) -> Saved:
    """Save an adapter whose other parameters have moved too."""
    fields = {"exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {}} | fields
    saved = save(kind, folder, targets=list(targets), **fields)
    file = saved.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    base = kind.build().state_dict()
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if "lora_" not in name or "magnitude" in name or "lora_B.bias" in name:
            if not name.endswith("base_layer.weight"):  # the base's own
                tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) / 4
    if fields.get("ensure_weight_tying"):
        head, embedding = (f"base_model.model.{n}" for n in ("lm_head", "model.embed_tokens"))
        if f"{head}.weight" in tensors:
            tensors[f"{head}.weight"] = tensors[f"{embedding}.weight"].clone()
    del base
    transformers.modeling_utils  # noqa: B018
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    return saved


def test_it_answers_as_the_adapter_in_peft(served, tmp_path):
    folder = merged(served, tmp_path / "out")
    torch.testing.assert_close(logits(folder), served.logits(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("case", KINDS)
def test_whatever_an_adapter_holds_is_merged(kind, case, tmp_path):
    saved = trained(kind, tmp_path, **KINDS[case])
    folder = merged(saved, tmp_path / "out")
    wanted = saved.logits()
    base = transformers.AutoModelForCausalLM.from_pretrained(saved.base)
    assert (base(input_ids=PROMPT).logits - wanted).abs().max() > 0.05
    torch.testing.assert_close(logits(folder), wanted, atol=1e-5, rtol=1e-5)
