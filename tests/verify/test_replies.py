"""With a base, replies and log probabilities are compared, in units of the adapter's effect."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers

from served import SERVED, Saved, change_config, save
from tlora import cli
from tlora.adapter.nested import mark_nested
from tlora.adapter.savedconfig import CONFIG
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig
from tlora.verify.replies import PROMPTS


@pytest.fixture(scope="module")
def talking(tmp_path_factory, tiny_tokenizer) -> Saved:
    """An adapter on a Llama with a tokenizer."""
    saved = save(SERVED["llama"], tmp_path_factory.mktemp("talking"))
    tiny_tokenizer.save_pretrained(saved.base)
    return saved


def run(tmp_path, *words):
    """Run `tlora verify`; return the exit code and what was measured."""
    numbers = tmp_path / "numbers.json"
    code = cli.main(["verify", *map(str, words), "--output", str(numbers)])
    return code, json.loads(numbers.read_text())["replies"]


@pytest.fixture
def prompts(tmp_path):
    """Three prompts in a file."""
    file = tmp_path / "prompts.txt"
    file.write_text("Natalia sold clips\n\nThe answer is\nunflinchingly\n")
    return file


def test_an_exact_export_replies_as_the_adapter(talking, prompts, tmp_path):
    folder = tmp_path / "out"
    export.run(ExportConfig(path=str(talking.adapter), output_dir=str(folder), format="uniform"))
    code, found = run(tmp_path, talking.adapter, folder, "--prompts", prompts)
    assert code == 0
    base, replies = found.values()
    assert base["of_effect"] == 1
    assert replies["of_effect"] < 1e-4
    assert replies["alike"] == replies["prompts"] == 3


def test_leading_ranks_of_dylora_reply_as_the_same_ranks_of_the_run(talking, prompts, tmp_path):
    whole, folder = shutil.copytree(talking.adapter, tmp_path / "whole"), tmp_path / "cut"
    mark_nested(whole, 1)
    fields = {"path": str(whole), "output_dir": str(folder), "max_rank": 1}
    export.run(ExportConfig(**fields, format="native"))
    code, found = run(tmp_path, whole, folder, "--prompts", prompts)
    assert code == 0
    assert found[f"replies of {folder}"]["of_effect"] < 1e-3


def test_an_export_of_another_scale_replies_otherwise(talking, prompts, tmp_path, capsys):
    other = shutil.copytree(talking.adapter, tmp_path / "other")
    change_config(other, alpha_pattern={}, lora_alpha=12)
    code, found = run(tmp_path, talking.adapter, other, "--prompts", prompts)
    assert code == 1
    assert found[f"replies of {other}"]["of_effect"] > 0.1
    assert f"replies of {other}: differs by" in capsys.readouterr().err


def test_the_scales_of_a_reader_are_tried_on_the_loaded_adapter(talking, tmp_path):
    """As loading the adapter with these scales; the norms are over the default prompts."""
    code, found = run(tmp_path, talking.adapter, "--model", talking.base, "--max_new_tokens", 1)
    assert code == 0
    other = shutil.copytree(talking.adapter, tmp_path / "other")
    change_config(other, rank_pattern={}, alpha_pattern={})
    fields = json.loads((talking.adapter / CONFIG).read_text())
    scale = fields["lora_alpha"] / fields["r"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(talking.base)
    model = talking.load()
    ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]

    def last():
        with torch.no_grad():
            return torch.stack([model(input_ids=i).logits[0, -1].log_softmax(-1) for i in ids])

    right = last()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] = scale
    expected = float((last() - right).norm())
    assert found["vLLM to 0.31"]["norm"] == pytest.approx(expected, rel=1e-4)
    assert found["vLLM to 0.31"]["of_effect"] > 0.1


def test_without_a_tokenizer_only_files_are_compared(varied, tmp_path, capsys):
    code, found = run(tmp_path, varied.adapter, "--model", varied.base)
    assert code == 0
    assert found == {}
    assert "replies: skipped" in capsys.readouterr().out


def test_prompts_may_be_messages(talking, tmp_path):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    file.write_text(json.dumps({"prompt": "a"}) + "\n")
    assert run(tmp_path, talking.adapter, talking.adapter, "--prompts", file)[0] == 0
    file.write_text(json.dumps({"messages": chat}) + "\n")
    words = ["verify", str(talking.adapter), str(talking.adapter), "--prompts", str(file)]
    assert cli.main(words) == 2  # the tokenizer has no chat template
