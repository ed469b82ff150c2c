"""The two orders that the picture of learning rates shows."""

from __future__ import annotations

import pytest


@pytest.fixture
def ratecurves(script):
    return script("quality", "ratecurves")


def test_the_order_at_one_rate_and_the_order_when_tuned(ratecurves, script):
    firsttry = script("quality", "firsttry")
    curves = {
        "LoRA": {1e-3: 2.0, 1e-2: 0.5},
        "PiSSA": {1e-3: 1.0, 1e-2: 3.0},
        "LoRA-GA": {1e-2: 0.7},
        "left out": {1e-3: 0.0},
    }
    task = firsttry.Task("a base", "sums", "lower", curves)
    fixed, tuned = ratecurves.orders(task, 1e-3, ["LoRA", "PiSSA", "LoRA-GA", "absent"])
    assert fixed == [("PiSSA", 1.0), ("LoRA", 2.0)]
    assert tuned == [("LoRA", 0.5), ("LoRA-GA", 0.7), ("PiSSA", 1.0)]


def test_higher_scores_come_first_where_they_are_better(ratecurves, script):
    firsttry = script("quality", "firsttry")
    task = firsttry.Task("a base", "sums", "higher", {"LoRA": {1e-3: 0.2}, "PiSSA": {1e-3: 0.4}})
    fixed, tuned = ratecurves.orders(task, 1e-3, ["LoRA", "PiSSA"])
    assert fixed == tuned == [("PiSSA", 0.4), ("LoRA", 0.2)]
