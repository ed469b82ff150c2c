"""Model cards: what they say of a run, that their code runs as written, what they keep back."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from tlora.files import read_json
from tlora.parsing import parse
from tlora.tasks.dataconfig import DataConfig
from tlora.training import initialize, model_card, train
from tlora.training.runconfig import RunConfig

SHORT = {"max_steps": 1, "save_strategy": "no"}
FACT = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)


def text_of(run) -> str:
    return (run.adapter / "README.md").read_text(encoding="utf-8")


def parts(card: str) -> tuple[dict, dict[str, str]]:
    """Return the front matter and the lines of the tables."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), dict(FACT.findall(body))


def code(card: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def executed(run, monkeypatch) -> tuple[dict, str]:
    """Run a card's Python as it is written, in the folder beside the adapter."""
    monkeypatch.chdir(run.path)
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in code(text_of(run)):
            exec(compile(block, "card", "exec"), names)
    return names, printed.getvalue()


def test_a_card_says_what_the_adapter_is(config, other_sums, llama_folder):
    run = train.run(config(eval_file=other_sums, trainer={"max_steps": 2, "save_steps": 2}))
    front, facts = parts(text_of(run))
    base = Path(llama_folder).name
    assert front == {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{base}", "lora", "tlora"],
    }
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    ranks = [value.shape[0] for name, value in tensors.items() if "lora_A" in name]
    assert facts["ranks"].startswith(f"{min(ranks)} to {max(ranks)} in {len(ranks)} modules (")
    assert facts["data"] == "sums.jsonl (24 rows)"
    assert facts["base model"] == f"`{base}`"
    metrics = read_json(run.metrics)
    assert float(facts["loss"]) == pytest.approx(metrics["loss"], rel=1e-3)
    assert float(facts["perplexity"]) == pytest.approx(math.exp(metrics["loss"]), rel=1e-3)
    assert "On other-sums.jsonl (24 rows):" in text_of(run)
    assert facts.keys().isdisjoint({"epoch", "num_tokens"})


def test_the_command_of_a_card_is_the_run_on_files_of_these_names(config, other_sums):
    fields = {
        "eval_file": other_sums,
        "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"], "allocate_rank": False},
        "data": DataConfig(loss_on="all", format="raw", system="Be brief: 1 | 2."),
        "seed": 3,
        "trainer": {"lr_scheduler_type": "linear"},
    }
    asked = config(**fields)
    words = shlex.split(model_card.command(asked))
    assert words[:2] == ["tlora", "train"]
    parsed = parse("tlora train", RunConfig, words[2:]).record.resolved().to_dict()
    expected = asked.resolved().to_dict() | {"output_dir": "run"}
    for name in ("model", "train_file", "eval_file"):
        expected[name] = Path(expected[name]).name
    expected["model"] = f"path/to/{expected['model']}"
    assert parsed == expected


@pytest.mark.parametrize("system", ["/no_think", "./a\n```\n# Big", "s" * 5000])
def test_texts_of_a_card_are_no_paths_and_break_no_fence(config, system):
    run = initialize.run(config(data=DataConfig(system=system, max_length=64, loss_on="all")))
    again = re.search(r"^(`{3,})sh\n(tlora .*?)\n\1$", text_of(run), re.DOTALL | re.MULTILINE)
    words = shlex.split(again[2])
    assert words[words.index("--data.system") + 1] == system
    assert again[1] not in again[2]


def test_no_path_of_the_machine_and_no_credential_is_in_a_card(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-this-machine")
    system = "Say a-secret-of-this-machine."
    run_config = config(trainer=SHORT)
    setup = train.settle(run_config)
    run = train.run(run_config)
    setup.task.data.system = system
    text = model_card.card(run.adapter, setup, {}, "train")
    assert str(tmp_path.parent) not in text
    assert "a-secret-of-this-machine" not in text
    assert "[hidden]" in text


def test_an_adapter_that_was_not_trained_says_so(config):
    run = initialize.run(config())
    assert "initialized, and not trained yet" in text_of(run)
    assert "## Scores" not in text_of(run)
    assert shlex.split(code(text_of(run), "sh")[-1])[:2] == ["tlora", "init"]


@pytest.mark.parametrize("style", ["raw", "alpaca", "chat"])
def test_the_code_of_a_card_runs_as_written(config, monkeypatch, style):
    data = DataConfig(format=style, chat_template="chatml" if style == "chat" else None)
    run = train.run(config(trainer=SHORT, data=data))
    names, printed = executed(run, monkeypatch)
    assert len(printed.splitlines()) >= 2  # a reply of the model, and one of the pipeline
    assert ("prompt" in names) == (style != "chat")
    if style == "alpaca":
        assert names["prompt"].startswith("Below is an instruction")
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    beside = peft.AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(merged(ids).logits, beside(ids).logits, atol=1e-5)


def test_vllm_is_told_the_largest_rank_and_only_what_it_can_read(config):
    run = train.run(config(trainer=SHORT, adapter={"r": 10}))
    most = max(model_card.ranks_of(run.adapter).values())
    words = shlex.split(code(text_of(run), "sh")[0])
    assert words[:2] == ["vllm", "serve"]
    assert most <= int(words[words.index("--max-lora-rank") + 1]) < 2 * max(most, 8)
    assert "vLLM from 0.32 on" in text_of(run)
    dora = train.run(config("dora", method="dora", adapter={"r": 4}, trainer=SHORT))
    assert "vllm serve" not in text_of(dora)
    lora = train.run(config("lora", method="lora", adapter={"r": 4}, trainer=SHORT))
    assert "by vLLM:" in text_of(lora)


def test_the_card_of_a_whole_model_loads_it_by_transformers(config, monkeypatch):
    run = train.run(config(method="full", adapter={}, trainer=SHORT))
    front, _ = parts(text_of(run))
    assert front["library_name"] == "transformers"
    assert front["tags"][0].startswith("base_model:finetune:")
    names, _ = executed(run, monkeypatch)
    assert "peft" not in names["model"].__class__.__module__
    assert not Path("merged").exists()


def test_the_card_of_a_folder_of_our_own_form_loads_it_by_us(config):
    run = train.run(config(method="houlsby", adapter={"r": 4}, trainer=SHORT))
    front, _ = parts(text_of(run))
    assert front["library_name"] == "tlora"
    assert "from tlora import load_adapter" in text_of(run)
    assert "serve it by the code above" in text_of(run)
    assert "merge_and_unload" not in text_of(run)
    assert str(Path(str(config().model)).parent) not in text_of(run)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_code_of_a_card_gives_a_head_its_labels(
    config, monkeypatch, saved, tiny_bert_classifier, tmp_path, kind
):
    label = ["bad", "good", "fair"] if kind == "classification" else [0.5, 1.5, 2.5]
    rows = [{"text": f"so {n}", "label": label[n % 3]} for n in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(kind=kind, text_column="text", label_column="label")
    model = saved(tiny_bert_classifier())
    run = train.run(
        config(model=model, train_file=str(file), data=data, trainer=SHORT, adapter={"r": 2})
    )
    names, printed = executed(run, monkeypatch)
    assert parts(text_of(run))[0]["pipeline_tag"] == "text-classification"
    trained = load_file(run.adapter / "adapter_model.safetensors")
    head = next(v for name, v in trained.items() if name.endswith("classifier.weight"))
    assert torch.equal(names["model"].base_model.model.classifier.weight, head)
    if kind == "classification":
        assert set(names["model"].config.id2label.values()) == set(label)
        assert any(name in printed.splitlines()[-1] for name in label)


def test_the_code_of_a_card_answers_by_text_to_text(config, monkeypatch, saved, tiny_t5):
    model = saved(tiny_t5())
    data = DataConfig(kind="seq2seq")
    run = train.run(config(model=model, data=data, trainer=SHORT, adapter={"r": 2}))
    names, _ = executed(run, monkeypatch)
    assert "pipeline" not in names
    assert names["reply"].ndim == 1
