"""Rows with and without prompts: how likely a model finds them, and how close its replies come."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tlora.errors import ConfigError, DataError
from tlora.evaluate import evaluate
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.evaluate.written_rows import WrittenRows
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }} so\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHATS = [
    [("user", "3+4?"), ("assistant", "7"), ("user", "and 5?"), ("assistant", "12 it is")],
    [("user", "1+1?"), ("assistant", "2")],
]
TEXTS = ["so it is", "so so", "1 + 1 is 2 and 2 + 2 is 4, so it is said"]


def written(name, rows) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def messages(chat) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in chat]}


def scores(tell=lambda text: None, **fields):
    """Return the scores by model, and the samples of the base."""
    config = EvalConfig(**{"tasks": ["jsonl"], "output_dir": "out"} | fields)
    (task,) = evaluate.run(config, tell).read()["tasks"]
    return task["scores"], EvalFolder(config.output_dir).read_samples(
        next(iter(task["scores"])), "jsonl"
    )


def test_rows_without_a_task_are_your_own():
    assert EvalConfig(models=["m"], test_file="rows.jsonl").tasks == ["jsonl"]
    assert EvalConfig(models=["m"], test_file="dev.tsv", tasks="sst2").tasks == ["sst2"]
    with pytest.raises(ConfigError, match="`tasks` is empty"):
        EvalConfig(models=["m"])


def loss(model, rows) -> float:
    """Return the mean of -log p over the tokens that count, a row at a time.

    ``rows``: (token ids, whether each is learned).
    """
    total, count = 0.0, 0
    for ids, learned in rows:
        with torch.no_grad():
            likely = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place in range(1, len(ids)):
            if learned[place]:
                total -= likely[place - 1, ids[place]].item()
                count += 1
    return total / count


@pytest.fixture(scope="module")
def run(config_in, tmp_path_factory):
    """A run of a few steps on chats."""
    folder = tmp_path_factory.mktemp("written")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    data = DataConfig(format="chat", chat_template=str(template))
    return train.run(config_in(folder / "run", data=data, trainer={"save_strategy": "no"}))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_texts_are_scored_by_the_loss_of_base_and_run(run, llama_folder, here, batch_size):
    file = written("texts.jsonl", [{"text": text} for text in TEXTS])
    fields = {"data": DataConfig(format="raw"), "batch_size": batch_size}
    said = []
    models = {"models": [str(run.path)], "with_base": True}
    found, samples = scores(said.append, test_file=file, **models, **fields)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    rows = []
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rows.append((ids, [True] * len(ids)))
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    for name, model in (("base", base), ("run", adapted)):
        expected = loss(model, rows)
        assert found[name]["-loss"] == pytest.approx(-expected, abs=1e-5)
        assert found[name]["-perplexity"] == pytest.approx(-math.exp(expected), rel=1e-5)
        assert found[name].keys() == {"-loss", "-perplexity"}
        assert any(
            line.startswith(f"{name}: jsonl: loss {-found[name]['-loss']:.4f}") for line in said
        )
    assert found["base"] != found["run"]
    assert [(line["prompt"], line["target"]) for line in samples] == [("", text) for text in TEXTS]


def test_of_a_chat_every_answer_is_scored_and_the_last_is_asked(run, here):
    file = written("chats.jsonl", [messages(chat) for chat in CHATS])
    found, samples = scores(models=[str(run.path)], test_file=file)
    assert [line["prompt"] for line in samples] == [
        "u: 3+4? so\na: 7 so\nu: and 5? so\na:",
        "u: 1+1? so\na:",
    ]
    assert [line["target"] for line in samples] == ["12 it is", "2"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.adapter)
    rows = []
    for chat in CHATS:
        text = "".join(f"{role[0]}: {content} so\n" for role, content in chat)
        spans, start = [], 0
        for role, content in chat:
            start = text.index(f"{role[0]}: {content}", start)
            if role == "assistant":
                spans.append((start + 2, start + len(f"a: {content} so")))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = encoded["offset_mapping"]
        learned = [any(a <= i and j <= b for a, b in spans) for i, j in places]
        rows.append((encoded["input_ids"], learned))
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    assert found["run"]["-loss"] == pytest.approx(-loss(adapted, rows), abs=1e-5)
    names = ["exact_match", "rouge1", "rouge2", "rougeL", "chrf", "-loss", "-perplexity"]
    assert [*found["run"]] == names


def test_the_template_that_a_run_learned_says_where_its_reply_ends(run, here):
    file = written("chats.jsonl", [messages(chat) for chat in CHATS])
    _, samples = scores(models=[str(run.path)], test_file=file)
    assert not any(" so" in line["reply"] for line in samples)


def test_text_to_text_is_scored_by_the_loss_of_its_targets(saved, tiny_t5, here):
    model = saved(tiny_t5())
    pairs = [("3+4?", "7"), ("10+11?", "it is 21"), ("so", "so")]
    file = written("rows.jsonl", [{"prompt": p, "response": r} for p, r in pairs])
    data = DataConfig(kind="seq2seq")
    found, _ = scores(models=[model], test_file=file, data=data, batch_size=2)
    t5 = transformers.AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for prompt, response in pairs:
        labels = tokenizer(text_target=response, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            own = t5(**tokenizer(prompt, return_tensors="pt"), labels=labels).loss
        total, count = total + own.item() * labels.numel(), count + labels.numel()
    assert found["base"]["-loss"] == pytest.approx(-total / count, abs=1e-4)
    assert "exact_match" in found["base"]


def test_a_limit_counts_for_loss_and_replies_alike(llama_folder, here):
    pairs = [{"prompt": f"{n}+{n}?", "response": f"{2 * n}"} for n in range(6)]
    file, less = written("rows.jsonl", pairs), written("less.jsonl", pairs[:3])
    fields = {"models": [llama_folder], "data": DataConfig(format="raw")}
    half, samples = scores(test_file=file, limit=0.5, **fields)
    Path("out").rename("half")
    whole, _ = scores(test_file=less, **fields)
    assert len(samples) == 3
    assert half == {"base": pytest.approx(whole["base"], abs=1e-6)}


def test_texts_need_a_backend_that_tells_their_loss(llama_folder, here):
    file = written("texts.jsonl", [{"text": "so"}])
    config = EvalConfig(models=["m"], tasks=["jsonl"], test_file=file, backend="vllm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    with pytest.raises(
        DataError, match="jsonl: plain text is only scored by its loss, which vLLM does not"
    ):
        WrittenRows(config, tokenizer)


def test_several_files_and_globs_are_scored_as_they_are_trained_on(llama_folder, here):
    rows = [{"prompt": f"{n}+1?", "response": str(n + 1)} for n in range(4)]
    whole = written("whole.jsonl", [*rows, rows[0], rows[0]])
    written("part-1.jsonl", rows[:2])
    written("part-2.jsonl", rows[2:])
    Path("more.csv").write_text("instruction,output\n0+1?,1\n")
    files = ["part-*.jsonl", {"path": "more.csv", "weight": 2}]
    fields = {"models": [llama_folder], "data": DataConfig(format="raw")}
    found, samples = scores(test_file=files, **fields)
    assert [sample["target"] for sample in samples] == ["1", "2", "3", "4", "1", "1"]
    (expected,) = scores(test_file=whole, **fields | {"output_dir": "whole"})[0].values()
    assert next(iter(found.values())) == pytest.approx(expected)


def test_texts_and_prompts_are_not_scored_together(llama_folder, here):
    written("a.jsonl", [{"text": "so it is"}])
    written("b.jsonl", [{"prompt": "1+1?", "response": "2"}])
    with pytest.raises(DataError, match=r"a.jsonl,b.jsonl: 1 of 2 rows are plain text"):
        scores(models=[llama_folder], test_file="a.jsonl,b.jsonl")


def test_results_of_other_rows_under_the_same_name_are_not_kept(llama_folder, here):
    fields = {"models": [llama_folder], "data": DataConfig(format="raw")}
    file = written("texts.jsonl", [{"text": "so it is"}])
    first, _ = scores(test_file=file, **fields)
    assert scores(test_file=file, **fields)[0] == first
    written("texts.jsonl", [{"text": "so it was"}])
    with pytest.raises(ConfigError, match="the file of `test_file` has changed since out was made"):
        scores(test_file=file, **fields)
