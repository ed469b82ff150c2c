"""What the first-try tables take from all committed tables, on numbers done by hand."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

from tlora.report import comparison

CURVE = {1e-3: 2.0, 1e-2: 1.0, 1e-1: 4.0}
DIVERGED = {1e-3: 2.0, 1e-2: 1.0, 1e-1: None}


@pytest.fixture
def firsttry(script):
    return script("quality", "firsttry")


@pytest.fixture
def task(firsttry):
    def made(name, curves, base="a base", higher=False):
        return firsttry.Task(base, name, "higher" if higher else "lower", curves)

    return made


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


def test_methods_are_told_apart_by_options_rank_scale_and_calibration(
    firsttry, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "report"))
    synthetic = importlib.import_module("synthetic")
    equal = {"allocate_rank": False, "allocate_scale": False}
    entries = [
        {"name": "lora", "adapter": {"r": 16, "lora_alpha": 16}, "label": "rank"},
        {"name": "lora", "adapter": {"lora_alpha": 2}, "label": "scale"},
        {"name": "lora", "adapter": {"lora_dropout": 0.1}, "label": "dropout"},
        {"name": "tlora", "adapter": equal, "calibration": {"samples": 4}, "label": "calibration"},
        {"name": "tlora", "adapter": equal | {"whiten": True}, "label": "whitened"},
        "lora",
        {"name": "tlora", "adapter": equal, "label": "equal"},
        {"name": "pissa"},
    ]
    made = synthetic.comparison(tmp_path, methods=entries, adapter={"r": 4, "lora_alpha": 4})
    folder = synthetic.write(made)
    pissa = made.config.entries()[-1]
    folder.record_file(made.tuning_of(pissa)[0].name).unlink()
    results = comparison.gather(made, folder)
    tuned = {m.label: m.tuning_means for m in results.methods}
    # PiSSA is not tuned to the end.
    assert firsttry.curves(results) == {"LoRA": tuned["lora"], "TLoRA, equal": tuned["equal"]}


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
    assert firsttry.score_at(CURVE, rate) == (pytest.approx(score), tried)


def test_next_to_a_rate_that_diverged_there_is_no_score(firsttry):
    assert firsttry.score_at(DIVERGED, 3e-2) == (None, True)
    assert firsttry.score_at(DIVERGED, 1e-1) == (None, True)
    assert firsttry.score_at(DIVERGED, 3e-3)[0] == pytest.approx(1.0 + math.log(1e-2 / 3e-3, 10))
