"""HumanEval, MBPP and their plus forms: what is cut out of a reply, run, and counted."""

import dataclasses
import itertools
import json

import lm_eval
import pytest
from scripted import (
    BODY,
    CASES,
    HUMANEVAL_ROW,
    MBPP_ROW,
    NAMES,
    PLUS_ROW,
    Scripted,
    config,
    evaluated,
    scores,
)

from tlora.errors import ConfigError, DataError
from tlora.evaluate import records
from tlora.evaluations import catalog
from tlora.evaluations.catalog import Settings
from tlora.evaluations.programs import program_in

CODE = [name for name in NAMES if config(name).get("unsafe_code")]
RIGHT = f"```python\ndef third(n):\n{BODY}\n```"
WRONG = "```python\ndef third(n):\n    return -1\n```"
ALLOWED = Settings(allow_code_execution=True)


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        ("\n    return 1\n", "    return 1"),
        ("See:\n```python\ndef f(): 1\n```\nDone.", "def f(): 1"),
        ("```\ndef f(): 1", "def f(): 1"),
        ("```sh\npip install x\n```\n```py\ndef f(): 1\n```", "def f(): 1"),
        ("```py\nx = 1\n```\n```py\nx = 2\n```", "x = 1"),
        ("```python\r\ndef f(): 1\r\n```", "def f(): 1"),
        ("def f(): 1\n\nassert f() == 1\n\ndef g(): 2", "def f(): 1"),
        ("def f(): 1\n# Example usage:\nf(1, 2)", "def f(): 1"),
        ("def f(): 1\nif __name__ == '__main__':\n    f()", "def f(): 1"),
        ("def f():\n    print(1)\n    assert True", "def f():\n    print(1)\n    assert True"),
        ("", ""),
    ],
)
def test_the_program_in_a_reply(reply, program):
    assert program_in(reply, ["f"]) == program


def test_unless_allowed_all_are_refused_at_once_before_a_row_is_read(tmp_path):
    with pytest.raises(ConfigError) as error:
        catalog.build([*CODE, "gsm8k-paper"], str(tmp_path / "nowhere"))
    assert len(error.value.faults) == len(CODE) == 4
    for name, fault in zip(CODE, error.value.faults, strict=True):
        assert fault.startswith(f"{name!r} runs programs written by the model")


def test_the_harness_itself_refuses_too(tmp_path):
    folder = CASES["humaneval-paper"].write(tmp_path)
    tasks = catalog.build(["humaneval-paper"], folder, ALLOWED)
    with pytest.raises(ValueError, match="confirm_run_unsafe_code=True"):
        lm_eval.evaluate(Scripted(lambda doc: RIGHT), {"tasks": tasks})


def test_drawn_programs_are_scored_by_pass_at_k(tmp_path):
    settings = Settings(allow_code_execution=True, samples=10, temperature=0.3)
    folder = CASES["mbpp-paper"].write(tmp_path)
    task = catalog.build(["mbpp-paper"], folder, settings)["mbpp-paper"]
    replies = itertools.cycle([RIGHT, WRONG, WRONG, WRONG, WRONG])
    model = Scripted(lambda doc: next(replies))
    found = evaluated({"mbpp-paper": task}, model)
    # 2 of 10 are right, and 10 tries hold one of them for certain.
    expected = pytest.approx({"pass@1": 0.2, "pass@10": 1.0})
    assert records.metrics(found["results"]["mbpp-paper"]) == expected
    (item,) = records.records(task, found["samples"]["mbpp-paper"])
    assert item["scores"] == expected
    assert item["reply"] == RIGHT
    assert len(model.asked) == 10
    for _, generation in model.asked:
        assert generation["do_sample"]
        assert (generation["temperature"], generation["top_p"]) == (0.3, 0.95)


@pytest.mark.parametrize(
    ("body", "base"),
    [
        ("    return n / 3 or 9", 1.0),  # wrong for 0, which is among the further inputs
        ("    return 0 if n == 9 else n / 3", 0.0),  # wrong for the one original input alone
    ],
)
def test_plus_needs_all_inputs_and_base_the_original_ones(body, base, tmp_path):
    folder = CASES["humaneval_plus-paper"].write(tmp_path)
    task = catalog.build(["humaneval_plus-paper"], folder, ALLOWED)["humaneval_plus-paper"]
    found, _ = scores(task, lambda doc: body)
    assert found == {"pass@1": 0.0, "pass@1_base": base}


def test_a_body_completes_the_prompt_of_humaneval(tmp_path):
    folder = CASES["humaneval-paper"].write(tmp_path)
    task = catalog.build(["humaneval-paper"], folder, ALLOWED)["humaneval-paper"]
    found, (item,) = scores(task, lambda doc: f"\n{BODY}\n")
    assert found == {"pass@1": 1.0}
    assert item["answer"] == f"{HUMANEVAL_ROW['prompt']}{BODY}\n"


def test_of_mbpp_only_the_test_split_is_asked(tmp_path):
    rows = [MBPP_ROW | {"task_id": number} for number in (1, 10, 11, 510, 511)]
    folder = dataclasses.replace(CASES["mbpp-paper"], rows=rows).write(tmp_path)
    task = catalog.build(["mbpp-paper"], folder, ALLOWED)["mbpp-paper"]
    assert [doc["item"] for doc in task.test_docs()] == ["11", "510"]


def test_a_plus_row_without_inputs_is_refused(tmp_path):
    (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(PLUS_ROW | {"plus_input": "none"}))
    with pytest.raises(DataError, match=r"row 1: row Test/0: column 'plus_input' is not a list"):
        catalog.build(["humaneval_plus-paper"], str(tmp_path), ALLOWED)
