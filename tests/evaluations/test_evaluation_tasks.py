"""What every evaluation of ours has to do, whatever it is about."""

import dataclasses
import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from scripted import CASES, NAMES, Scripted, config, evaluated, scores

import tlora.evaluations
from tlora.errors import DataError
from tlora.evaluate import records
from tlora.evaluations import catalog
from tlora.evaluations.catalog import Settings

ALLOWED = Settings(allow_code_execution=True)


def made(name, folder, settings=ALLOWED):
    return catalog.build([name], CASES[name].write(folder), settings)[name]


def test_every_evaluation_has_a_case():
    assert sorted(CASES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_scored_and_kept(name, tmp_path):
    task, case = made(name, tmp_path), CASES[name]
    model = Scripted(case.right[0])
    found = evaluated({name: task}, model)
    # The prompt is that of training, and generation is greedy.
    prompts = [prompt for prompt, _ in model.asked]
    assert prompts == [case.training(row)["prompt"] + case.opening for row in case.rows]
    said = config(name)["generation_kwargs"]
    for _, generation in model.asked:
        assert generation["until"] == said["until"]
        assert generation["max_gen_toks"] == said["max_gen_toks"]
        assert not generation["do_sample"]
        assert generation["temperature"] == 0.0
    # A record of an item has all that a reader needs.
    items = records.records(task, found["samples"][name])
    assert len({item["item"] for item in items}) == len(items) == len(case.rows)
    for item, doc in zip(items, task.test_docs(), strict=True):
        assert list(item) == ["item", "prompt", "reply", "answer", "target", "scores"]
        assert item["prompt"] == task.doc_to_text(doc)
        assert item["reply"] == case.right[0](doc)
        assert item["answer"] is not None
        assert item["item"] == doc["item"]
        assert item["scores"] == dict.fromkeys(task.aggregation(), 1.0)
    if case.targets:
        assert [item["target"] for item in items] == case.targets
    # Other right replies score one, near misses zero.
    for right, replies in ((1.0, case.right[1:]), (0.0, case.wrong)):
        for reply in replies:
            results, items = scores(task, reply)
            assert results == dict.fromkeys(task.aggregation(), right), items
            assert all(item["scores"] == results for item in items)
    line = catalog.protocol(task)
    assert "\n" not in line
    assert "arXiv" in line


ONE_OF_EACH = ["gsm8k-paper", "math-paper", "humaneval_plus-paper", "mbpp-paper", "boolq-paper"]
ONE_OF_EACH += ["svamp-llm-adapters"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_missing_file_and_a_row_without_its_columns_are_named(name, tmp_path):
    with pytest.raises(DataError) as error:
        catalog.build([name], str(tmp_path), ALLOWED)
    said = str(error.value)
    assert said.startswith(f"{name}: {tmp_path} has none of ")
    for path in config(name)["dataset_kwargs"]["files"]:
        assert path in said
    folder = dataclasses.replace(CASES[name], rows=[{"nonsense": "1"}]).write(tmp_path)
    with pytest.raises(DataError, match=r"row 1: .*column"):
        catalog.build([name], folder, ALLOWED)


def test_without_tlora_lm_eval_asks_and_scores_the_same(tmp_path):
    asked = ["gsm8k-metamath", "math500-paper", "mbpp-paper", "commonsense-paper"]
    names = [*asked[:3], *config("commonsense-paper")["task"]]
    for name in names:
        folder = CASES[name].write(tmp_path)
    manager = TaskManager(
        include_path=str(Path(tlora.evaluations.__file__).parent),
        include_defaults=False,
        metadata={"data_dir": folder},  # as `lm_eval --metadata '{"data_dir": ...}'`
    )

    def replies_to(doc):
        return f"So.\nthe correct answer is {doc['target']}\nThe answer is: {doc['target']}"

    plain, model = Scripted(replies_to), Scripted(replies_to)
    found = lm_eval.simple_evaluate(
        plain,
        tasks=asked,
        task_manager=manager,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    tasks = catalog.build(asked, folder, ALLOWED)
    ours = evaluated(tasks, model)
    assert sorted(tasks) == sorted(names) == sorted(ours["results"])
    assert sorted(map(str, model.asked)) == sorted(map(str, plain.asked))
    for name, task in tasks.items():
        assert records.metrics(found["results"][name]) == records.metrics(ours["results"][name])
        assert records.records(task, found["samples"][name]) == records.records(
            task, ours["samples"][name]
        )
    assert found["results"]["boolq-paper"]["exact_match,true-false"] == 1.0


def test_rows_that_share_a_name_are_called_by_their_number(tmp_path):
    case = CASES["math-paper"]
    folder = case.write(tmp_path)
    row = json.dumps(case.rows[0])
    (tmp_path / case.file).write_text(f"{row}\n{row}\n")
    task = catalog.build(["math-paper"], folder)["math-paper"]
    assert [doc["item"] for doc in task.test_docs()] == ["0", "1"]


def test_a_chat_template_gets_the_prompt_as_a_users_message(tmp_path):
    task = made("gsm8k-paper", tmp_path)
    doc = task.test_docs()[0]

    def template(messages, add_generation_prompt):
        assert add_generation_prompt
        return json.dumps(messages)

    chat = {"apply_chat_template": True, "chat_template": template}
    assert json.loads(task.fewshot_context(doc, 0, system_instruction="Be brief.", **chat)) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": doc["prompt"]},
    ]
    assert task.fewshot_context(doc, 0) == doc["prompt"]
