"""The merged model is the adapter on its base, for every kind of thing that an adapter holds."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from families import DECODER, FAMILIES, Kind
from served import PROMPT, Saved, save
from tlora import cli
from tlora.adapter.saved import read_lora
from tlora.errors import AdapterError
from tlora.exporters import checkpoint, export
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
    """Save an adapter of which everything has moved, and not A and B alone."""
    fields = {"exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {}} | fields
    saved = save(kind, folder, targets=list(targets), **fields)
    file = saved.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        still = name.endswith(("base_layer.weight", "_A.weight", "_B.weight", "ing_A", "ing_B"))
        if not still:  # A and B have moved, and those of the base do not
            tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) / 4
    if fields.get("ensure_weight_tying") and fields.get("modules_to_save"):
        head, embedding = (
            f"base_model.model.{n}.weight" for n in ("lm_head", "model.embed_tokens")
        )
        tensors[head] = tensors[embedding].clone()
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


def in_bfloat16(saved: Saved, folder: Path, size: str = "5GB") -> Saved:
    """Return the same with a base in bfloat16, in files of a size."""
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(saved.base, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=size)
    return Saved(folder, saved.adapter)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def test_a_base_in_shards_keeps_their_names_and_its_index(varied, tmp_path):
    base = in_bfloat16(varied, tmp_path / "base", "4KB").base
    folder = merged(varied, tmp_path / "out", model=str(base))
    indices = [
        json.loads((each / "model.safetensors.index.json").read_text()) for each in (base, folder)
    ]
    assert indices[0] == indices[1]
    assert len({*indices[0]["weight_map"].values()}) > 3
    for name, file in indices[1]["weight_map"].items():
        assert name in load_file(folder / file)
    before, after = weights(base), weights(folder)
    lora = read_lora(varied.adapter)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in lora.keys}


def test_total_size_follows_the_dtype(varied, tmp_path):
    base = in_bfloat16(varied, tmp_path / "base", "4KB").base
    folder = merged(varied, tmp_path / "out", model=str(base), dtype="float32")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in weights(folder).values())
    assert {each.dtype for each in weights(folder).values()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_a_weight_is_rounded_once(varied, tmp_path):
    """The error is that of rounding the exact sum; PEFT's safe merge rounds the update too."""
    saved = in_bfloat16(varied, tmp_path / "base")
    before = weights(saved.base)
    ours = weights(merged(varied, tmp_path / "out", model=str(saved.base)))
    model = transformers.AutoModelForCausalLM.from_pretrained(saved.base, dtype=torch.bfloat16)
    adapted = peft.PeftModel.from_pretrained(model, str(saved.adapter))
    theirs = adapted.merge_and_unload(safe_merge=True)
    lora, errors = read_lora(saved.adapter), torch.zeros(3, dtype=torch.float64)
    for name in lora.keys:
        key, factors = f"{name}.weight", lora.factors(name)
        exact = before[key].double() + factors.scale * factors.b.double() @ factors.a.double()
        found = (ours[key], theirs.state_dict()[key], exact.bfloat16())
        errors += torch.stack([(each.double() - exact).square().sum() for each in found])
    assert errors[0] < 1.0001 * errors[2]
    assert errors[1] > 1.1 * errors[0]


def test_one_tensor_is_in_memory_at_a_time(varied, tmp_path, monkeypatch):
    alive: list[Any] = []

    def watched(made):
        def call(*given):
            assert not any(each() is not None for each in alive)
            tensor = made(*given)
            alive.append(weakref.ref(tensor))
            return tensor

        return call

    monkeypatch.setattr(checkpoint.Stored, "read", watched(checkpoint.Stored.read))
    merged(varied, tmp_path / "out")
    assert len(alive) == len(weights(varied.base))


def test_a_longer_vocabulary_is_merged(tmp_path):
    for kind in (TIED, UNTIED):
        folder = tmp_path / str(kind.fields.get("tie_word_embeddings"))
        model = kind.build()
        model.save_pretrained(folder / "base")
        model.resize_token_embeddings(162)
        rows = {"model.embed_tokens": [160, 161]}
        rows |= {} if kind is TIED else {"lm_head": [160, 161]}
        config = peft.LoraConfig(
            target_modules=["q_proj"], trainable_token_indices=rows, task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * len(name) % 1)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / "adapter")
        out = merged(Saved(folder / "base", folder / "adapter"), folder / "out")
        prompt = torch.tensor([[1, 160, 42, 161]])
        whole = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert whole.config.vocab_size == 162
        assert whole.config.tie_word_embeddings is (kind is TIED)
        with torch.no_grad():
            wanted = adapted.eval()(input_ids=prompt).logits
            torch.testing.assert_close(whole(input_ids=prompt).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["head", "embedding", "embedding-in-full", "both-in-full"])
def test_a_tied_head_gets_weights_of_its_own(case, tmp_path, capsys):
    saved = trained(TIED, tmp_path, **KINDS[case])
    words = ["merge", str(saved.adapter), "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    found = weights(tmp_path / "out")
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert "`tie_word_embeddings` is false" in capsys.readouterr().out


def test_a_tied_head_stays_tied_where_nothing_pulls_it_apart(tmp_path):
    folder = merged(trained(TIED, tmp_path, **KINDS["rows"]), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights(folder)


def test_an_encoder_and_decoder_that_scale_a_tied_head_stay_together(tmp_path):
    saved = trained(FAMILIES["t5"], tmp_path, ["q", "lm_head"], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(AdapterError, match=r"lm_head.weight, which T5For\w+ ties"):
        merged(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_adapter_is_merged_as_it_is_exported(varied, tmp_path):
    folder = merged(varied, tmp_path / "out", max_rank=2)
    path = str(varied.adapter)
    cut = tmp_path / "cut"
    export.run(ExportConfig(path=path, output_dir=str(cut), format="native", max_rank=2))
    torch.testing.assert_close(logits(folder), varied.logits(cut), atol=1e-5, rtol=1e-5)


def test_biases_of_b_need_biases_in_the_base(tmp_path):
    saved = save(FAMILIES["llama"], tmp_path, lora_bias=True)
    with pytest.raises(AdapterError, match="has biases of B, which would merge into model"):
        merged(saved, tmp_path / "out")
