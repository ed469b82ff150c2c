"""Ranks and scales against the released rules, written out here once more."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from tlora.linalg.allocation import (
    RankBounds,
    allocate_ranks,
    allocate_ranks_by_cost,
    allocate_scales,
    equal_ranks,
)

WIDE = RankBounds(0, 10**9)
HOSTILE = [1e-320, 1e-310, 1e-200, 1.0, 1e300]


def random_sensitivities(draw: random.Random) -> list[float]:
    spread = draw.choice([0.1, 1.0, 4.0])
    return [math.exp(draw.gauss(0, spread)) for _ in range(draw.randint(1, 30))]


def random_cases(count: int) -> Iterator[tuple[list[float], int, list[RankBounds]]]:
    """Sensitivities, a base rank, and bounds with room for N r."""
    draw = random.Random(0)
    while count:
        sensitivities = random_sensitivities(draw)
        for index in range(len(sensitivities)):
            if draw.random() < 0.1:
                sensitivities[index] *= draw.choice([0.0, 1e-30, 1e30])
        rank = draw.choice([1, 2, 8, 16, 100])
        tight = draw.random() < 0.6
        low = draw.randint(0, rank) if tight else 0
        highest = (5 if tight else 1000) * rank
        bounds = [RankBounds(low, draw.randint(low, highest)) for _ in sensitivities]
        if sum(b.high for b in bounds) >= rank * len(bounds):
            count -= 1
            yield sensitivities, rank, bounds


def correct(ranks: list[int], target: int, bounds: list[RankBounds]) -> list[int]:
    """Missing or surplus ranks go one by one to the largest rank that may move."""
    while sum(ranks) != target:
        step = 1 if sum(ranks) < target else -1
        best = -1
        for i, rank in enumerate(ranks):
            if bounds[i].low <= rank + step <= bounds[i].high and (best < 0 or rank > ranks[best]):
                best = i
        ranks[best] += step
    return ranks


def released_ranks(sensitivities: list[float], rank: int) -> list[int]:
    wanted = rank * len(sensitivities)
    if max(sensitivities) == 0:  # The release divides by zero here.
        return [rank] * len(sensitivities)
    total = sum(sensitivities)
    ranks = []
    for value in sensitivities:
        exact = wanted * value / total
        below = math.floor(exact)
        half = exact - below
        ranks.append(below + (half > 0.5 or (half == 0.5 and below % 2 == 1)))
    return correct(ranks, wanted, [WIDE] * len(ranks))


def inside(ranks: tuple[int, ...], bounds: list[RankBounds]) -> bool:
    return all(b.low <= rank <= b.high for rank, b in zip(ranks, bounds, strict=True))


def filled_level(
    sensitivities: list[float], budget: float, bounds: list[RankBounds], costs: list[int]
) -> list[float]:
    """Return clamp(c S_i, low, high) with the c that spends ``budget``, by bisection on log c."""

    def at(log_level: float) -> list[float]:
        return [
            min(max(math.exp(log_level) * s, b.low), b.high)
            for s, b in zip(sensitivities, bounds, strict=True)
        ]

    low, high = -200.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(k * x for k, x in zip(costs, at(middle), strict=True))
        low, high = (middle, high) if spent < budget else (low, middle)
    return at(low)


def test_the_sum_is_exactly_n_r_and_bounds_hold_wherever_that_is_feasible() -> None:
    for sensitivities, rank, bounds in random_cases(400):
        found = allocate_ranks(sensitivities, rank, bounds)
        assert sum(found.ranks) == found.spent == found.wanted == rank * len(sensitivities)
        assert found.feasible
        assert inside(found.ranks, bounds)


def test_the_released_rule_wherever_no_bound_binds() -> None:
    bound = 0
    for sensitivities, rank, bounds in random_cases(400):
        expected = tuple(released_ranks(sensitivities, rank))
        assert allocate_ranks(sensitivities, rank, [WIDE] * len(sensitivities)).ranks == expected
        if inside(expected, bounds):
            assert allocate_ranks(sensitivities, rank, bounds).ranks == expected
        else:
            bound += 1
    assert 100 < bound < 300


@pytest.mark.parametrize(
    ("sensitivities", "rank", "expected"),
    [
        ([1, 3], 1, (0, 2)),  # 0.5 and 1.5 round to even: 0 and 2.
        ([1, 1, 1, 1, 4], 1, (1, 1, 1, 1, 1)),  # 0.625 four times and 2.5: 1 1 1 1 2, one less.
        ([3, 5, 8], 1, (1, 1, 1)),  # 0.5625, 0.9375, 1.5: 1 1 2, one less.
        ([1, 1, 2], 3, (2, 2, 5)),  # 2.25, 2.25, 4.5: 2 2 4, one more.
        ([6, 1, 1], 8, (18, 3, 3)),
        ([7, 7, 2], 1, (2, 1, 0)),  # 1.3125, 1.3125, 0.375: 1 1 0, one more for the first.
    ],
)
def test_released_ranks_by_hand(
    sensitivities: list[float], rank: int, expected: tuple[int, ...]
) -> None:
    assert allocate_ranks(sensitivities, rank, [WIDE] * len(sensitivities)).ranks == expected


def test_a_binding_bound_moves_the_level_and_nothing_else() -> None:
    checked = 0
    for sensitivities, rank, bounds in random_cases(400):
        if min(sensitivities) == 0 or inside(tuple(released_ranks(sensitivities, rank)), bounds):
            continue
        checked += 1
        target = rank * len(sensitivities)
        level = filled_level(sensitivities, target, bounds, [1] * len(bounds))
        expected = correct([round(x) for x in level], target, bounds)
        assert allocate_ranks(sensitivities, rank, bounds).ranks == tuple(expected)
    assert checked > 50


def test_more_ranks_than_the_matrices_hold_is_flagged() -> None:
    found = allocate_ranks([1, 2, 3], 10, [RankBounds(1, 4)] * 3)
    assert (found.ranks, found.wanted, found.spent, found.feasible) == ((4, 4, 4), 30, 12, False)


def test_lower_bounds_above_the_budget_are_flagged() -> None:
    found = allocate_ranks([1, 2, 3], 2, [RankBounds(3, 9)] * 3)
    assert (found.ranks, found.wanted, found.spent, found.feasible) == ((3, 3, 3), 6, 9, False)
    found = allocate_ranks_by_cost([1, 2, 3], 2, [RankBounds(3, 9)] * 3, [5, 6, 7])
    assert (found.ranks, found.wanted, found.spent, found.feasible) == ((3, 3, 3), 36, 54, False)


@pytest.mark.parametrize("value", [0.0, 1e-320, 0.3, 1.0, 1e300])
def test_equal_sensitivities_share_equally(value: float) -> None:
    for count in (1, 3, 7, 224):
        bounds = [RankBounds(1, 64)] * count
        costs = [100 + index for index in range(count)]
        assert allocate_ranks([value] * count, 8, bounds).ranks == (8,) * count
        assert allocate_ranks_by_cost([value] * count, 8, bounds, costs).ranks == (8,) * count
        for rule in ("released", "proportional", "constant"):
            assert allocate_scales([value] * count, 8, 16, rule) == pytest.approx([2.0] * count)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-30])
@pytest.mark.parametrize("index", [0, 2])
def test_a_sensitivity_that_is_no_size_is_named(bad: float, index: int) -> None:
    sensitivities = [1.0, 2.0, 3.0]
    sensitivities[index] = bad
    message = f"sensitivity {index} is {bad}"
    with pytest.raises(ValueError, match=message):
        allocate_ranks(sensitivities, 8, [WIDE] * 3)
    with pytest.raises(ValueError, match=message):
        allocate_ranks_by_cost(sensitivities, 8, [WIDE] * 3, [1, 1, 1])
    with pytest.raises(ValueError, match=message):
        allocate_scales(sensitivities, 8, 8, "released")


def test_no_module_is_an_error() -> None:
    with pytest.raises(ValueError, match="no modules"):
        allocate_ranks([], 8, [])
    with pytest.raises(ValueError, match="no modules"):
        allocate_ranks_by_cost([], 8, [], [])
    with pytest.raises(ValueError, match="no modules"):
        allocate_scales([], 8, 8, "constant")


def test_lengths_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 sensitivities but 3"):
        allocate_ranks([1, 2], 8, [WIDE] * 3)
    with pytest.raises(ValueError, match="2 sensitivities but 1"):
        allocate_ranks_by_cost([1, 2], 8, [WIDE] * 2, [1])


@pytest.mark.parametrize("high", [10, 16, 64, 10**6])
def test_a_huge_range_of_sensitivities_keeps_the_budget(high: int) -> None:
    bounds = [RankBounds(1, high)] * 5
    for sensitivities in (HOSTILE, HOSTILE[::-1], [1e-310, 1.0], [1e-310, 1.0, 1e-320]):
        bounds = [RankBounds(1, high)] * len(sensitivities)
        costs = [3, 5, 7, 11, 13, 17][: len(sensitivities)]
        found = allocate_ranks(sensitivities, 8, bounds)
        assert sum(found.ranks) == 8 * len(sensitivities)
        assert inside(found.ranks, bounds)
        found = allocate_ranks_by_cost(sensitivities, 8, bounds, costs)
        spent = sum(k * rank for k, rank in zip(costs, found.ranks, strict=True))
        assert found.spent == spent <= 8 * sum(costs)
        assert inside(found.ranks, bounds)
        scales = allocate_scales(sensitivities, 8, 8, "proportional")
        assert sum(scales) / len(scales) == pytest.approx(1.0)


def test_the_most_sensitive_of_a_huge_range_gets_the_most() -> None:
    for high in (10, 20, 10**6):
        found = allocate_ranks(HOSTILE, 8, [RankBounds(1, high)] * 5)
        assert found.ranks[-1] == max(found.ranks) == min(high, 36)
        found = allocate_ranks_by_cost(HOSTILE, 8, [RankBounds(1, high)] * 5, [1] * 5)
        assert found.ranks[-1] == max(found.ranks) == min(high, 36)


def test_the_parameter_budget_is_kept_and_used_up() -> None:
    draw = random.Random(1)
    for sensitivities, rank, bounds in random_cases(400):
        costs = [draw.choice([1, 7, 16, 64, 1000]) for _ in sensitivities]
        found = allocate_ranks_by_cost(sensitivities, rank, bounds, costs)
        spent = sum(k * r for k, r in zip(costs, found.ranks, strict=True))
        assert found.wanted == rank * sum(costs)
        assert found.spent == spent <= found.wanted
        assert found.feasible
        assert inside(found.ranks, bounds)
        left = found.wanted - spent
        growing = zip(costs, found.ranks, bounds, strict=True)
        assert all(k > left for k, r, b in growing if r < b.high)


def test_the_parameter_budget_is_shared_in_proportion_to_sensitivity() -> None:
    draw = random.Random(2)
    for sensitivities, rank, bounds in random_cases(200):
        if min(sensitivities) == 0:
            continue
        costs = [draw.choice([1, 7, 16, 64]) for _ in sensitivities]
        ranks = allocate_ranks_by_cost(sensitivities, rank, bounds, costs).ranks
        level = filled_level(sensitivities, rank * sum(costs), bounds, costs)
        # What rounding down left, less than sum_i k_i, can only raise a rank.
        assert all(r >= math.floor(x - 1e-6) for r, x in zip(ranks, level, strict=True))
        for k, r, x in zip(costs, ranks, level, strict=True):
            assert (r - math.floor(x + 1e-6)) * k < sum(costs)


def test_what_rounding_left_goes_to_the_module_furthest_below_its_share() -> None:
    # 12 ranks, shares 2.4, 5.1 and 4.5: 2, 5, 4, and the last has lost most.
    assert allocate_ranks_by_cost([16, 34, 30], 4, [WIDE] * 3, [2, 2, 2]).ranks == (2, 5, 5)
    # 3 ranks, shares 0.975, 1.0875 and 0.9375: 0, 1, 0.
    assert allocate_ranks_by_cost([26, 29, 25], 1, [WIDE] * 3, [10, 10, 10]).ranks == (1, 1, 1)


def test_what_zero_sensitivities_are_left_goes_round_them_at_once() -> None:
    # Bounds that leave most of the budget to modules without a share: one rank each, in turn.
    bounds = [RankBounds(2, 3), RankBounds(1, 10**9), RankBounds(4, 10**9), RankBounds(0, 10**6)]
    found = allocate_ranks_by_cost([1.0, 0.0, 0.0, 0.0], 10**8, bounds, [7, 2, 3, 1])
    rounds = (13 * 10**8 - 3 * 7 - 2 - 12 - 10**6 * 6) // 5
    assert found.ranks == (3, 1 + 10**6 + rounds, 4 + 10**6 + rounds, 10**6)
    assert 0 <= found.wanted - found.spent < 2


def test_the_level_weighs_a_rank_by_its_cost() -> None:
    # c (2 * 3 + 1 * 6) = 4 * (3 + 6): c = 3, so ranks 6 and 3, not 4 N shared two to one.
    found = allocate_ranks_by_cost([2, 1], 4, [WIDE] * 2, [3, 6])
    assert (found.ranks, found.spent, found.wanted) == ((6, 3), 36, 36)
    # c (2 * 1 + 1 * 4) = 2 * (1 + 4): ranks 3.33 and 1.67; of the 3 left only the cheap one fits.
    found = allocate_ranks_by_cost([2, 1], 2, [WIDE] * 2, [1, 4])
    assert (found.ranks, found.spent, found.wanted) == ((6, 1), 10, 10)


def test_a_parameter_budget_beyond_all_upper_bounds_fills_every_module() -> None:
    found = allocate_ranks_by_cost([1, 2], 10, [RankBounds(1, 3), RankBounds(1, 4)], [5, 6])
    assert (found.ranks, found.wanted, found.spent) == ((3, 4), 110, 39)


def test_released_scales_are_written_out() -> None:
    draw = random.Random(3)
    for _ in range(300):
        sensitivities = random_sensitivities(draw)
        rank, alpha = draw.choice([(8, 8), (8, 16), (128, 128), (16, 3), (8, 0.5)])
        total = sum(sensitivities)
        expected = []
        for value in sensitivities:
            share = round(len(sensitivities) * alpha * value / total)
            expected.append((alpha if share < alpha else share) / rank)
        found = allocate_scales(sensitivities, rank, alpha, "released")
        assert found == tuple(expected)
        assert min(found) >= alpha / rank


def test_released_scales_by_hand() -> None:
    # Shares of N alpha = 48: 4, 12, 32; all divided by the base rank 8.
    assert allocate_scales([1, 3, 8], 8, 16, "released") == (2.0, 2.0, 4.0)


def test_proportional_scales_follow_sensitivity_and_keep_the_mean() -> None:
    draw = random.Random(4)
    for _ in range(100):
        sensitivities = random_sensitivities(draw)
        scales = allocate_scales(sensitivities, 8, 12, "proportional")
        mean = sum(sensitivities) / len(sensitivities)
        assert scales == pytest.approx([12 / 8 * value / mean for value in sensitivities])
        assert sum(scales) / len(scales) == pytest.approx(12 / 8)


def test_constant_scales_ignore_sensitivity() -> None:
    assert allocate_scales([1, 5, 0], 8, 12, "constant") == (1.5, 1.5, 1.5)


def test_an_unknown_scale_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'loudest'"):
        allocate_scales([1, 2], 8, 8, "loudest")


def test_equal_ranks_are_equal_and_nobody_gets_what_others_cannot_take():
    bounds = [RankBounds(1, 64)] * 3 + [RankBounds(1, 2)] * 2
    found = equal_ranks(16, bounds)
    assert found.ranks == (16, 16, 16, 2, 2)
    assert (found.wanted, found.spent, found.feasible) == (80, 52, False)
    assert equal_ranks(2, bounds).feasible
    assert equal_ranks(2, [RankBounds(3, 9)]).ranks == (3,)


def test_a_budget_beyond_all_bounds_is_spent_up_to_them():
    bounds = [RankBounds(1, 64), RankBounds(0, 48), RankBounds(2, 4096)]
    found = allocate_ranks([3.0, 0.1, 1e-9], 10**30, bounds)
    assert found.ranks == (64, 48, 4096)
    assert (found.wanted, found.spent, found.feasible) == (3 * 10**30, 4208, False)
