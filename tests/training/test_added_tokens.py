"""`--tokens.add`: special tokens whose rows of embedding and head train, and come back by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from support import logits_of
from tlora import TLoraConfig, cli, load_adapter
from tlora.errors import ConfigError
from tlora.models.tokens import add_tokens, make_rows
from tlora.registry import METHODS
from tlora.training import initialize, train
from tlora.training.runconfig import RunConfig, TokensConfig

TOKENS = TokensConfig(add=["<a>", "<b>"])
IDS = torch.tensor([[5, 160, 6, 161, 7]])


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("rows") / "marked.jsonl"
    rows = [{"prompt": f"<a>{n}+{n}?", "response": f" {n + n}<b>"} for n in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def reloaded(model: str, adapter: Path, dtype="float32", read=peft.PeftModel.from_pretrained):
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    make_rows(base, tokenizer)
    return tokenizer, read(base, adapter).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_added_tokens_train_and_come_back(config, saved, tiny_llama, marked, tied, dtype):
    folder = saved(tiny_llama(tie_word_embeddings=tied).to(getattr(torch, dtype)))
    run = train.run(config(model=folder, train_file=marked, tokens=TOKENS))

    weights = load_file(run.adapter / "adapter_model.safetensors")
    rows = {name: value for name, value in weights.items() if "lora_" not in name}
    assert {value.shape for value in rows.values()} == {(2, 16)}
    assert len(rows) == (1 if tied else 2)
    tokenizer, model = reloaded(folder, run.adapter, dtype)
    assert tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [160, 161]
    assert tokenizer("<a>5<b>", add_special_tokens=False).input_ids[::2] == [160, 161]
    before = model.get_base_model().model.embed_tokens.original_module.weight[:160]
    saved_rows = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(before, saved_rows.get_input_embeddings().weight)
    assert logits_of(model, {"input_ids": IDS}).isfinite().all()


def test_rows_start_at_the_mean_and_both_sides_move(config, saved, tiny_llama, marked):
    folder = saved(tiny_llama(tie_word_embeddings=False, initializer_range=0.2))
    fields = {"model": folder, "train_file": marked, "tokens": TOKENS}
    runs = initialize.run(config("init", **fields)), train.run(config("run", **fields))
    start, end = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
    weights = load_file(Path(folder) / "model.safetensors")
    for side, layer in (("embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head")):
        (name,) = [key for key in start if side in key and "lora_" not in key]
        mean = weights[f"{layer}.weight"].mean(dim=0)
        assert (start[name] - mean).abs().max() < 0.05
        assert (end[name] != start[name]).any(dim=1).all()


def test_a_resumed_run_ends_in_the_same_rows(config, saved, tiny_llama, marked, interrupted):
    folder = saved(tiny_llama(tie_word_embeddings=True))
    fields = {"model": folder, "train_file": marked, "tokens": TOKENS}
    whole = train.run(config("whole", **fields))
    interrupted(config("cut", **fields), 3)
    resumed = train.run(config("cut", resume=True, **fields))
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_saves_the_rows(method, config, saved, tiny_llama, marked):
    folder = saved(tiny_llama(tie_word_embeddings=True))
    own = {"adalora": {"init_r": 4, "target_r": 2}, "full": {}}
    own["qa-lora"] = {"r": 2, "group_size": 4}
    own["xgblora"] = own["rac-lora"] = {"r": 2, "length": 2}
    fields = {"method": method, "adapter": own.get(method, {"r": 2})}
    run = train.run(config(model=folder, train_file=marked, tokens=TOKENS, **fields))
    if method == "full":
        model = transformers.AutoModelForCausalLM.from_pretrained(run.adapter)
        assert model.get_input_embeddings().weight.shape[0] == 162
    else:
        alone = METHODS.load(method).traits.leaves == "own"  # PEFT cannot read the folder
        read = load_adapter if alone else peft.PeftModel.from_pretrained
        _, model = reloaded(folder, run.adapter, read=read)
    assert logits_of(model, {"input_ids": IDS}).shape[-1] == 162


def test_an_evaluation_uses_the_tokens_of_the_run(config, saved, tiny_llama, marked, tmp_path):
    folder = saved(tiny_llama())
    run = train.run(config(model=folder, train_file=marked, tokens=TOKENS))
    words = ["eval", str(run.path), "--with_base", "--tasks", "jsonl", "--test_file", marked]
    words += ["--limit", "2", "--device", "cpu", "--output_dir", str(tmp_path / "eval")]
    assert cli.main(words) == 0


def test_tokens_that_are_there_are_not_added_again(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    add_tokens(tokenizer, ["</s>", "<a>"])
    assert (len(tokenizer), tokenizer.convert_tokens_to_ids("<a>")) == (161, 160)
    add_tokens(tokenizer, ["<a>"])
    assert len(tokenizer) == 161


def test_what_is_wrong_with_tokens_is_said(config, marked):
    with pytest.raises(ConfigError, match="names a token twice, or an empty one"):
        RunConfig(tokens=TokensConfig(add=["<a>", "<a>"]))
    both = config(train_file=marked, tokens=TOKENS, adapter={"trainable_token_indices": [3]})
    with pytest.raises(ConfigError, match="give only one"):
        train.run(both)


def test_token_ids_train_without_adding_any(config, sums):
    run = train.run(config(train_file=sums, adapter={"trainable_token_indices": [19, 20]}))
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert [v.shape for k, v in weights.items() if "lora_" not in k] == [(2, 16)]
    assert TLoraConfig(trainable_token_indices=[3]).trainable_token_indices == [3]
