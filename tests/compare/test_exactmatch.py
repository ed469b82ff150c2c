"""Exact match by writing, on tokenized rows, and as the metric of a comparison."""

from __future__ import annotations

import dataclasses
import json

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tlora.compare import compare
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.exactmatch import exact_match, prompt_and_response
from tlora.compare.experiment import experiment
from tlora.demo.run import _answer, _load_base
from tlora.errors import ConfigError, DataError
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.tokens import causal


def sums(count):
    """Problems in a form that the base knows."""
    asked = "Tom has {} eggs. Tom buys {} more. How many eggs does Tom have now? Answer:"
    numbers = [(n + 11, 3 * n + 2) for n in range(count)]
    return [{"prompt": asked.format(a, b), "response": f"{a}+{b}={a + b}"} for a, b in numbers]


def tokenized(tokenizer, rows):
    return Dataset.from_list([causal(tokenizer, row, DataConfig()) for row in rows])


def test_it_equals_what_is_written_a_row_at_a_time_and_leaves_the_model_as_it_was():
    model, tokenizer = _load_base()
    rows = sums(8)
    right = [row | {"response": _answer(model, tokenizer, row["prompt"])} for row in rows]
    mixed = [*right[:6], *(dict(row, response="no number") for row in right[6:])]
    model.train()
    for batch_size in (1, 3, 100):
        assert exact_match(model, tokenizer, tokenized(tokenizer, mixed), batch_size) == 0.75
    assert model.training


def test_it_is_greedy_whatever_the_checkpoint_asks_of_generation():
    model, tokenizer = _load_base()
    rows = tokenized(tokenizer, sums(8))
    plain = exact_match(model, tokenizer, rows, 8)
    assert plain > 0.5
    model.generation_config.update(
        repetition_penalty=5.0, min_new_tokens=8, do_sample=True, num_beams=2
    )
    before = model.generation_config.to_dict()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for each in (model, adapted):
        assert exact_match(each, tokenizer, rows, 8) == plain
        assert each.generation_config.to_dict() == before


def test_a_row_without_prompt_or_with_two_responses_is_refused():
    assert prompt_and_response({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}) == ([5], [6, 7])
    for labels in ([5, 6, 7, 8], [-100, 6, -100, 8]):
        with pytest.raises(DataError, match="exact match needs rows with one prompt"):
            prompt_and_response({"input_ids": [5, 6, 7, 8], "labels": labels})


def test_what_a_chat_template_writes_after_the_answer_is_left_out():
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100]}
    assert prompt_and_response(row) == ([5], [6, 7])


def test_the_answer_of_a_chat_is_written_up_to_the_end_of_its_turn(config):
    asked = dataclasses.replace(config, data=DataConfig(format="chat", chat_template="chatml"))
    setup = compare.check(asked)
    (prompt, response), *_ = map(prompt_and_response, setup.held_out)
    assert setup.tokenizer.decode(prompt).endswith("assistant\n")
    assert "user" not in setup.tokenizer.decode(response)
    assert setup.held_out[0]["input_ids"] != prompt + response


@pytest.fixture
def config(llama_folder, sums, other_sums, tmp_path):
    return CompareConfig(
        model=llama_folder,
        train_file=sums,
        test_file=other_sums,
        validation=4,
        methods=["lora"],
        learning_rates=[1e-2],
        tuning_seeds=[0],
        final_seeds=[1],
        threads=1,
        metric="exact_match",
        output_dir=str(tmp_path / "out"),
        trainer={"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True},
    )


def test_a_comparison_by_it_writes_answers_and_higher_is_better(config):
    found = compare.identify(config, compare.check(config))
    assert (found.metric, found.better) == ("exact_match", "higher")
    progress = compare.run(config)
    assert (progress.finished, progress.failed) == (2, [])
    folder = compare.CompareFolder(config.output_dir)
    for record in map(folder.record, folder.names()):
        (scores,) = record["scores"].values()
        assert 0 <= scores["exact_match"] <= 1
        assert scores["loss"] > 0


def test_runs_by_loss_are_other_runs(config):
    by_loss, by_name = (dataclasses.replace(config, metric=m) for m in ("loss", None))
    assert experiment(by_loss) == experiment(by_name) != experiment(config)


def test_plain_text_is_refused_before_anything_is_written(config):
    whole = dataclasses.replace(config, data=DataConfig(loss_on="all"))
    with pytest.raises(DataError, match="exact match needs rows with one prompt"):
        compare.run(whole)
    assert not compare.CompareFolder(config.output_dir).path.exists()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_rows_whose_response_is_cut_are_refused(config, part, tmp_path):
    # The rows of one side have a longer response than those of the other.
    long, file = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    long.write_text(json.dumps({"prompt": "long?", "response": "so " * 40}) + "\n")
    file.write_text(json.dumps({"prompt": "short?", "response": "so"}) + "\n")
    sides = {"validation": str(file), "test_file": str(file)}
    sides[{"validation": "validation", "test": "test_file"}[part]] = str(long)
    cut = dataclasses.replace(config, data=DataConfig(format="raw", max_length=40), **sides)
    with pytest.raises(
        DataError, match=f"of 1 of 1 {part} rows are truncated at `data.max_length`, 40 tokens"
    ):
        compare.run(cut)
    assert not compare.CompareFolder(config.output_dir).path.exists()
    by_loss = dataclasses.replace(cut, metric="loss")
    assert compare.check(by_loss)
    compare.check(dataclasses.replace(cut, data=DataConfig(format="raw", max_length=256)))


def test_a_comparison_by_loss_may_have_it_of_its_final_runs_which_stay_the_same_runs(config):
    plain = dataclasses.replace(config, metric="loss")
    both = dataclasses.replace(plain, answers=True)
    assert experiment(both) == experiment(plain)
    progress = compare.run(both)
    assert (progress.finished, progress.failed) == (2, [])
    folder = compare.CompareFolder(both.output_dir)
    scored = {r["phase"]: r["scores"] for r in map(folder.record, folder.names())}
    assert "exact_match" not in scored["tuning"]["validation"]
    assert 0 <= scored["final"]["test"]["exact_match"] <= 1


@pytest.fixture
def sst2_rows(tmp_path):
    rows = tmp_path / "rows.tsv"
    lines = [f"film {number}\t{number % 2}" for number in range(12)]
    rows.write_text("\n".join(["sentence\tlabel", *lines]))
    return str(rows)


def test_it_is_refused_of_tasks_that_write_nothing(config, sst2_rows):
    asked = dataclasses.replace(
        config,
        task="sst2",
        metric=None,
        answers=True,
        train_file=sst2_rows,
        test_file=sst2_rows,
        data=DataConfig(overlap="allow"),
    )
    with pytest.raises(
        ConfigError, match="`answers` only applies to causal tasks, but sst2 is a classif"
    ):
        compare.check(asked)
