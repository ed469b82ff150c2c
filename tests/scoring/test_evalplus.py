"""HumanEval+ and MBPP+ by EvalPlus's rules: the verdicts of its own release."""

import json
from pathlib import Path

import pytest

from tlora.scoring.evalplus import inputs_check
from tlora.scoring.evalplus_rules import evalplus_compare, evalplus_inputs
from tlora.scoring.pass_at_k import run_checks
from tlora.scoring.sandbox import Sandbox

PUBLISHED = json.loads(Path(__file__).with_name("evalplus_verdicts.json").read_text())


def defined(source, name):
    namespace = {}
    exec(source, namespace)
    return namespace[name]


def test_verdicts_are_those_of_evalplus():
    for task, name, reference, program, inputs, tolerance, right in PUBLISHED["verdicts"]:
        functions = defined(program, name), defined(reference, name)
        try:
            evalplus_compare(task, name, functions, inputs, tolerance)
        except Exception:
            passed = False
        else:
            passed = True
        assert passed is right, (task, program, reference, tolerance)


def test_the_table_of_verdicts_has_both_for_every_oracle():
    verdicts = PUBLISHED["verdicts"]
    oracles = {name for task, name, *_ in verdicts if task.startswith("Mbpp/")} - {"other"}
    assert len(oracles) == 16
    for name in oracles:
        assert {right for _, other, *_, right in verdicts if other == name} == {True, False}


def test_inputs_are_those_of_evalplus():
    for task, inputs, expected in PUBLISHED["inputs"]:
        assert repr([list(each) for each in evalplus_inputs(task, inputs)]) == expected


def compared(program, reference, inputs):
    evalplus_compare("HumanEval/0", "f", (program, reference), inputs, 0)


def test_an_input_that_the_reference_refuses_is_left_out():
    compared(lambda x: x + 1, lambda x: x + 1, [[1], ["one"]])
    with pytest.raises(AssertionError, match="refuses every input"):
        compared(lambda x: x, lambda x: 1 / 0, [[1], [2]])


def test_the_input_that_a_program_fails_is_named():
    with pytest.raises(AssertionError, match=r"\[2\] gives 2"):
        compared(lambda x: 2, lambda x: 2 + (x > 1), [[1], [2], [3]])


def test_an_input_that_a_program_changes_is_whole_for_the_other():
    def popping(x):
        return x.pop()

    inputs = [[[1, 2]]]
    compared(popping, popping, inputs)
    assert inputs == [[[1, 2]]]


def row(task, name, reference, inputs):
    return {
        "task_id": task,
        "prompt": f"def {name}(x):\n",
        "entry_point": name,
        "canonical_solution": f"    {reference}\n",
        "plus_input": inputs,
    }


def test_in_the_sandbox_the_rules_are_the_same():
    """Floats need numpy there; the names of the rules may be the program's too."""
    sandbox = Sandbox(allow_untrusted_code=True)
    halves = row("HumanEval/0", "halves", "return [each / 2 for each in x]", [[[1, 2]]])
    tuples = row("Mbpp/2", "similar_elements", "return tuple(set(x))", [[[1, 1, 2]]])
    close = "return [each * 0.5 + 1e-9 for each in x]"
    programs = [
        (halves, f"def halves(x): {close}", True),
        (halves, "def halves(x): return [0.5, 1.001]", False),
        (halves, f"def evalplus_compare(*a): pass\n_close = max\ndef halves(x): {close}", True),
        (halves, "def evalplus_compare(*a): pass\ndef halves(x): return 1", False),
        (tuples, "def similar_elements(x): assert type(x) is tuple; return [2, 1]", True),
    ]
    results = run_checks(sandbox, [inputs_check(r, p, "plus_input") for r, p, _ in programs])
    assert [result.passed for result in results] == [right for *_, right in programs]
