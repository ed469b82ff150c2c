import itertools

import pytest

from tlora.errors import ConfigError, DataError
from tlora.scoring.pass_at_k import (
    HUMANEVAL_STOPS,
    Check,
    humaneval_check,
    mbpp_check,
    pass_at_k,
    run_checks,
    truncated,
)
from tlora.scoring.sandbox import Limits, Sandbox

HUMANEVAL = {
    "task_id": "Test/0",
    "prompt": 'from typing import List\n\ndef total(x: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "total",
    "test": "def check(candidate):\n"
    "    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
MBPP = {
    "task_id": 1,
    "test_setup_code": "root = Node(3)",
    "test_list": ["assert sum(root, 1) == 4", "assert set([sum(root, 2)]) == {5}"],
}
MBPP_CODE = "class Node:\n    def __init__(self, v): self.v = v\ndef sum(n, k): return n.v + k"


@pytest.fixture(scope="module")
def sandbox():
    # Ample, so that a busy machine changes no verdict.
    return Sandbox(allow_untrusted_code=True, limits=Limits(seconds=600.0, cpu_seconds=60))


def test_pass_at_k_is_the_share_of_draws_with_a_right_sample():
    for samples, right, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if max(right, k) > samples:
            continue
        draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        share = sum(map(any, draws)) / len(draws)
        assert pass_at_k(samples, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples_stays_finite():
    assert pass_at_k(10**6, 1, 10**5) == pytest.approx(0.1, rel=1e-9)
    assert pass_at_k(10**5, 5, 1) == pytest.approx(5e-5, rel=1e-9)


@pytest.mark.parametrize(("samples", "right", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_is_refused_where_it_is_not_defined(samples, right, k):
    with pytest.raises(
        ConfigError, match=f"pass@{k} is undefined for {samples} samples with {right} correct"
    ):
        pass_at_k(samples, right, k)


def test_a_completion_ends_at_the_first_stop():
    text = "    return 1\n\ndef other():\n    pass\nprint(1)"
    assert truncated(text, HUMANEVAL_STOPS) == "    return 1\n"
    assert truncated("    return 1", HUMANEVAL_STOPS) == "    return 1"


def test_a_humaneval_program_is_prompt_and_completion(sandbox):
    check = humaneval_check(HUMANEVAL, "    return sum(x)\n\ndef more():\n    1 / 0\nmore()")
    assert check.program == HUMANEVAL["prompt"] + "    return sum(x)\n"
    results = run_checks(sandbox, [check, humaneval_check(HUMANEVAL, "    return 3\n")])
    assert [result.passed for result in results] == [True, False]
    assert results[1].detail == "AssertionError, at: assert candidate([]) == 0"


def test_helpers_of_the_prompt_are_the_prompts_in_the_tests(sandbox):
    row = HUMANEVAL | {
        "prompt": "def double(x):\n    return 2 * x\n\ndef total(x):\n",
        "test": "def check(candidate):\n    assert candidate(3) == double(3)\n",
    }
    right = humaneval_check(row, "    return double(x)")
    forged = humaneval_check(row, "    global double\n    double = lambda x: 0\n    return 0")
    assert [result.passed for result in run_checks(sandbox, [right, forged])] == [True, False]


def test_an_mbpp_program_brings_its_classes_and_may_be_called_as_a_built_in(sandbox):
    check = mbpp_check(MBPP, MBPP_CODE + "\nassert False")
    assert check.entry_points == ("sum",)
    wrong = mbpp_check(MBPP, MBPP_CODE.replace("+", "-"))
    assert [result.passed for result in run_checks(sandbox, [check, wrong])] == [True, False]


def test_what_an_mbpp_row_tests_is_what_every_assert_calls():
    def names(*tests):
        return mbpp_check(MBPP | {"test_list": list(tests)}, "").entry_points

    assert names("assert sum(1) == 2", "assert sum(2) == 3") == ("sum",)
    assert names("assert set(pairs(1)) == set()", "assert set(pairs(2)) == {2}") == ("pairs",)
    assert names("assert f(g(1))", "assert f(2)") == ("f",)


def test_results_come_in_the_order_of_the_checks(sandbox):
    checks = [Check(f"x = {n}", f"assert x != {n % 2}", ()) for n in range(6)]
    assert [r.passed for r in run_checks(sandbox, checks, workers=3)] == [False] * 2 + [True] * 4


def test_a_row_that_lacks_a_column_is_named():
    with pytest.raises(DataError, match="row Test/0: column 'test' is missing"):
        humaneval_check({k: v for k, v in HUMANEVAL.items() if k != "test"}, "")
    with pytest.raises(DataError, match="MBPP row 1: its tests are not valid Python"):
        mbpp_check(MBPP | {"test_list": ["assert ("]}, "")
