"""Ranks and scales for any sensitivities, budgets, bounds and costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fuzzing import bounded, fuzz
from hypothesis import strategies as st

from tlora.linalg.allocation import (
    RankAllocation,
    RankBounds,
    allocate_ranks,
    allocate_ranks_by_cost,
    allocate_scales,
    equal_ranks,
)

LARGEST = 2**31
VALUES = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0, 5e-324, 1e-300, 1e-38, 1.7e308]),
    st.floats(0, 10),
    st.floats(0, allow_infinity=False),
)
RANKS = st.one_of(st.integers(1, 64), st.integers(1, LARGEST), st.sampled_from([1, 8, 2**62]))


@st.composite
def modules(draw: st.DrawFn) -> list[tuple[float, RankBounds, int]]:
    """Return the sensitivity, the bounds and the parameters per rank of a few modules."""
    few = st.sampled_from(draw(st.lists(VALUES, min_size=1, max_size=4)))
    values = draw(st.lists(few, min_size=1, max_size=24))
    lows = st.integers(0, draw(st.sampled_from([0, 1, 4, 100])))
    room = st.integers(0, draw(st.sampled_from([0, 1, 8, 4096, LARGEST])))
    costs = st.integers(1, draw(st.sampled_from([1, 3, 5000, LARGEST])))
    found = []
    for value in values:
        low = draw(lows)
        found.append((value, RankBounds(low, low + draw(room)), draw(costs)))
    return found


def columns(given: list[tuple[float, RankBounds, int]]) -> list[Any]:
    return [list(column) for column in zip(*given, strict=True)]


def check_bounds(found: RankAllocation, bounds: list[RankBounds]) -> None:
    assert all(type(rank) is int for rank in found.ranks)
    assert all(b.low <= rank <= b.high for rank, b in zip(found.ranks, bounds, strict=True))


@fuzz(120, given=modules(), rank=RANKS, draw=st.randoms(use_true_random=False))
def test_ranks_sum_to_the_budget_within_their_bounds(given, rank, draw):
    values, bounds, _ = columns(given)
    with bounded():
        found = allocate_ranks(values, rank, bounds)
    check_bounds(found, bounds)
    least, most = sum(b.low for b in bounds), sum(b.high for b in bounds)
    assert found.wanted == rank * len(values)
    assert found.spent == sum(found.ranks) == min(max(found.wanted, least), most)
    assert found.feasible == (found.spent == found.wanted)
    assert allocate_ranks(values, rank, bounds) == found
    draw.shuffle(given)
    again = allocate_ranks(*columns(given)[:1], rank, columns(given)[1])
    assert again.spent == found.spent
    assert (again.wanted, again.feasible) == (found.wanted, found.feasible)
    if len(set(bounds)) == 1:  # who of equals comes first depends on the order
        assert sorted(again.ranks) == sorted(found.ranks)


@fuzz(100, given=modules(), rank=RANKS)
def test_ranks_keep_to_a_budget_of_parameters(given, rank):
    values, bounds, costs = columns(given)
    with bounded():
        found = allocate_ranks_by_cost(values, rank, bounds, costs)
    check_bounds(found, bounds)
    least = sum(k * b.low for k, b in zip(costs, bounds, strict=True))
    assert found.wanted == rank * sum(costs)
    assert found.spent == sum(k * rank for k, rank in zip(costs, found.ranks, strict=True))
    assert found.spent <= max(found.wanted, least)
    assert found.feasible == (least <= found.wanted)
    left = found.wanted - found.spent
    free = [k for k, r, b in zip(costs, found.ranks, bounds, strict=True) if r < b.high]
    assert all(cost > left for cost in free)
    assert allocate_ranks_by_cost(values, rank, bounds, costs) == found


@fuzz(20, given=modules(), rank=RANKS)
def test_equal_ranks_are_the_base_rank_within_the_bounds(given, rank):
    _, bounds, _ = columns(given)
    found = equal_ranks(rank, bounds)
    check_bounds(found, bounds)
    assert list(found.ranks) == [min(max(rank, b.low), b.high) for b in bounds]


@fuzz(
    40,
    given=modules(),
    rank=st.integers(1, LARGEST),
    alpha=st.floats(1e-9, 1e9) | st.integers(1, LARGEST),
    draw=st.randoms(use_true_random=False),
)
def test_scales_follow_the_modules_in_any_order(given, rank, alpha, draw):
    values, order = columns(given)[0], list(range(len(given)))
    draw.shuffle(order)
    for rule in ("released", "proportional", "constant"):
        with bounded():
            found = allocate_scales(values, rank, alpha, rule)
        assert all(math.isfinite(scale) and scale >= 0 for scale in found)
        assert allocate_scales([values[i] for i in order], rank, alpha, rule) == tuple(
            found[i] for i in order
        )
        if rule == "proportional":
            assert math.fsum(found) == pytest.approx(len(found) * alpha / rank)
        if rule == "released":
            assert min(found) >= alpha / rank * (1 - 1e-12)


BAD = st.sampled_from([-1.0, -5e-324, float("nan"), float("inf"), -float("inf")])


@fuzz(10, given=modules(), bad=BAD, place=st.integers(0, 30))
def test_what_is_no_sensitivity_is_refused_by_its_place(given, bad, place):
    values, bounds, costs = columns(given)
    place %= len(values)
    values[place] = bad
    for allocate in (
        lambda: allocate_ranks(values, 8, bounds),
        lambda: allocate_ranks_by_cost(values, 8, bounds, costs),
        lambda: allocate_scales(values, 8, 8, "released"),
    ):
        with pytest.raises(ValueError, match=f"sensitivity {place} is "):
            allocate()
