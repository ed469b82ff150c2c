"""Checkpoints as people have them: tied weights by either name, 16 bits, no padding token."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tlora.models.pretrained import Pretrained, positions_of
from tlora.training import train

CAUSAL = "transformers:AutoModelForCausalLM"


def test_tied_embeddings_may_be_saved_under_the_heads_name(saved, tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    file = Path(saved(model)) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, file, {"format": "pt"})
    loaded, drawn = Pretrained(name=str(file.parent)).model(CAUSAL, torch.device("cpu"))
    assert drawn == []
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_16_bits_without_a_padding_token(config, saved, tiny_llama, dtype):
    folder = saved(tiny_llama(pad_token_id=None, tie_word_embeddings=True).to(dtype))
    file = Path(folder) / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in fields.items() if k != "pad_token"}))
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None

    run = train.run(config(model=folder))

    log = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in log if "loss" in line)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert base.dtype == dtype
    model = peft.PeftModel.from_pretrained(base, run.adapter)
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "holds"),
    [
        (transformers.LlamaConfig(max_position_embeddings=77), 77),
        (transformers.GPT2Config(n_positions=33), 33),
        (transformers.MambaConfig(), None),
        (transformers.LlavaConfig(text_config={"max_position_embeddings": 55}), 55),
    ],
)
def test_positions_are_read_from_the_text_configuration(config, holds):
    assert positions_of(config) == holds


def test_an_embedding_that_trains_in_full_stays_tied(config, saved, tiny_llama):
    folder = saved(tiny_llama(tie_word_embeddings=True))
    adapter = {"r": 4, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    run = train.run(config(model=folder, adapter=adapter))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    start = base.get_input_embeddings().weight.clone()
    model = peft.PeftModel.from_pretrained(base, run.adapter).merge_and_unload()
    assert not torch.equal(model.model.embed_tokens.weight, start)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
