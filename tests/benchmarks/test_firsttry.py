"""The arithmetic of the first-try table on numbers that are done by hand."""

from __future__ import annotations

import math

import pytest


@pytest.fixture
def firsttry(script):
    return script("quality", "firsttry")


@pytest.fixture
def task(firsttry):
    def made(name, curves, base="a base", higher=False):
        return firsttry.Task(base, name, higher, curves)

    return made


CURVE = {1e-3: 2.0, 1e-2: 1.0, 1e-1: 4.0}


def test_best_is_the_lowest_loss_or_the_highest_score_of_equal_ones_at_the_lowest_rate(firsttry):
    assert firsttry.best(CURVE, higher=False) == (1.0, 1e-2)
    assert firsttry.best(CURVE, higher=True) == (4.0, 1e-1)
    assert firsttry.best({3e-2: 1.0, 1e-2: 1.0, 1e-3: None}, higher=False) == (1.0, 1e-2)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([1e-3, 1e-2, 1e-1], 1e-2), ([1e-3, 1e-1], 1e-2), ([1e-3, 1e-3, 1e-1], 1e-3)],
)
def test_the_default_is_the_geometric_median_of_the_best_rates(firsttry, rates, expected):
    others = [({rate: 1.0, 5 * rate: 2.0}, False) for rate in rates]
    assert firsttry.default_rate(others) == pytest.approx(expected)


def test_without_another_task_there_is_no_default(firsttry):
    assert firsttry.default_rate([]) is None


@pytest.mark.parametrize(
    ("rate", "score", "tried"),
    [
        (1e-2, 1.0, True),
        (10**-2.5, 1.5, True),  # halfway in the logarithm
        (10**-1.25, 3.25, True),
        (1e-4, 2.0, False),
        (1.0, 4.0, False),
    ],
)
def test_a_score_is_interpolated_over_the_logarithm_of_the_rate(firsttry, rate, score, tried):
    found, within = firsttry.score_at(CURVE, rate)
    assert (found, within) == (pytest.approx(score), tried)


def test_an_outermost_rate_that_was_computed_by_logarithms_counts_as_tried(firsttry):
    rate = math.exp(math.log(1e-1))
    assert firsttry.score_at(CURVE, math.nextafter(rate, 1)) == (4.0, True)


def test_next_to_a_rate_that_diverged_there_is_no_score(firsttry):
    curve = {1e-3: 2.0, 1e-2: 1.0, 1e-1: None}
    assert firsttry.score_at(curve, 3e-2) == (None, True)
    assert firsttry.score_at(curve, 1e-1) == (None, True)
    assert firsttry.score_at(curve, 3e-3)[0] == pytest.approx(1.0 + math.log(1e-2 / 3e-3, 10))


def test_the_width_ends_where_the_score_is_five_percent_worse_than_the_best(firsttry):
    # 1.05 is crossed 5 % of the decade below the best, and 1/60 of the decade above it.
    factor, wider = firsttry.width(CURVE, higher=False)
    assert factor == pytest.approx(10 ** (0.05 + 0.05 / 3))
    assert not wider
    mirrored = {rate: 2.0 - score / 10 for rate, score in CURVE.items()}  # 1.8, 1.9, 1.6
    factor, _ = firsttry.width(mirrored, higher=True)
    assert factor == pytest.approx(10 ** (0.095 / 0.1 + 0.095 / 0.3))


def test_the_width_says_when_the_rates_that_were_tried_end_first(firsttry):
    assert firsttry.width({1e-3: 1.0, 1e-2: 1.04}, higher=False) == (pytest.approx(10), True)
    factor, wider = firsttry.width({1e-3: 1.0, 1e-2: 1.1}, higher=False)
    assert (factor, wider) == (pytest.approx(10**0.5), True)  # open below


def test_a_rate_that_diverged_ends_the_width(firsttry):
    curve = {1e-3: 2.0, 1e-2: 1.0, 1e-1: None}
    factor, wider = firsttry.width(curve, higher=False)
    assert (factor, wider) == (pytest.approx(10**0.05), False)


def test_the_task_itself_has_no_say_in_its_default_and_neither_has_another_base_with_it(
    firsttry, task
):
    low, high = {1e-3: 1.0, 1e-2: 2.0}, {1e-3: 2.0, 1e-2: 1.0}
    tasks = {
        "one": task("sums", {"LoRA": high}, base="small"),
        "two": task("sums", {"LoRA": high}, base="large"),
        "three": task("code", {"LoRA": low}, base="large"),
    }
    tries = firsttry.first_tries(tasks, same_base=False)
    assert tries["one"]["LoRA"].rate == pytest.approx(1e-3)
    assert tries["one"]["LoRA"].score == pytest.approx(2.0)
    assert tries["one"]["LoRA"].excess == pytest.approx(1.0)
    assert tries["three"]["LoRA"].rate == pytest.approx(1e-2)
    same = firsttry.first_tries(tasks, same_base=True)
    assert same["one"] == {}
    assert same["two"]["LoRA"].rate == pytest.approx(1e-3)


def test_excess_is_over_the_best_of_all_methods(firsttry, task):
    tasks = {
        "one": task("sums", {"LoRA": {1e-3: 0.5}, "PiSSA": {1e-3: 0.8}}, higher=True),
        "two": task("code", {"LoRA": {1e-3: 1.0}, "PiSSA": {1e-3: 3.0}}),
    }
    tries = firsttry.first_tries(tasks, same_base=False)
    assert tries["one"]["LoRA"].excess == pytest.approx(0.375)
    assert tries["one"]["PiSSA"].excess == 0
    assert tries["two"]["PiSSA"].excess == pytest.approx(2.0)


def test_mean_ranks_are_over_methods_that_all_tables_have(firsttry, task):
    tasks = {
        "one": task("sums", {"LoRA": {1: 0.5}, "PiSSA": {1: 0.8}}, higher=True),
        "two": task("code", {"LoRA": {1: 1.0}, "PiSSA": {1: 1.0}, "LoRA-FA": {1: 0.1}}),
    }
    tries = firsttry.first_tries(tasks, same_base=False)
    assert firsttry.mean_ranks(tasks, tries, tuned=True) == {"LoRA": 1.75, "PiSSA": 1.25}


def test_runs_are_told_apart_by_options_rank_calibration_and_phase(firsttry):
    def run(method, adapter, loss, **fields):
        return {
            "method": method,
            "adapter": adapter,
            "phase": "tuning",
            "calibration": {},
            "learning_rate": 1e-3,
            "scores": {"validation": {"loss": loss}},
        } | fields

    equal = {"allocate_rank": False, "allocate_scale": False, "r": 4}
    runs = [
        run("lora", {"r": 4}, 1.0, seed=0),
        run("lora", {"r": 4}, 2.0, seed=1),
        run("lora", {"r": 4}, 5.0, phase="final"),
        run("lora", {"r": 16}, 5.0),
        run("lora", {"r": 4, "lora_dropout": 0.1}, 5.0),
        run("tlora", {"r": 4}, 3.0),
        run("tlora", equal, 4.0),
        run("tlora", equal, 5.0, calibration={"samples": 4}),
        run("tlora", equal | {"whiten": True}, 5.0),
        run("pissa", {"r": 4}, None),
    ]
    assert firsttry.curves(runs, rank=4, score="loss") == {
        "LoRA": {1e-3: 1.5},
        "the paper's rule": {1e-3: 3.0},
        "TLoRA, equal": {1e-3: 4.0},
        "PiSSA": {1e-3: None},
    }
