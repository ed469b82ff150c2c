"""Allocates ranks and scales to modules in proportion to sensitivity.

Source: arXiv 2604.18124, section 3, and the released code's rounding (docs/method.md, 4 and 5).
Each departure is named in its function: ranks have bounds, and the budget can count parameters. The
numbers are plain Python floats because there are only a few hundred modules and rounding should not
depend on a device.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RankBounds:
    """Limits of one module's rank: low <= r_i <= high, where high includes min(m, d)."""

    low: int
    high: int


@dataclass(frozen=True)
class RankAllocation:
    """Ranks, and whether they meet the budget.

    Attributes:
        ranks: r_i, one per module.
        wanted: the budget (in ranks or parameters, as asked).
        spent: how much of the budget the ranks use. "rank": equals ``wanted`` unless the bounds
            forbid it. "params": at most ``wanted``, unless the lower bounds alone cost more.
        feasible: False where the bounds forbid the budget, with ``spent`` the nearest possible.
    """

    ranks: tuple[int, ...]
    wanted: int
    spent: int
    feasible: bool


def equal_ranks(base_rank: int, bounds: Sequence[RankBounds]) -> RankAllocation:
    """Give every module rank r, clamped to its bounds; clamped ranks are not redistributed.

    Args:
        base_rank: r.
        bounds: bounds of each module's rank.
    """
    ranks = tuple(round(_clamp(base_rank, each)) for each in bounds)
    wanted = len(ranks) * base_rank
    return RankAllocation(ranks, wanted, sum(ranks), sum(ranks) == wanted)


def allocate_ranks(
    sensitivities: Sequence[float], base_rank: int, bounds: Sequence[RankBounds]
) -> RankAllocation:
    """Allocate N r ranks in proportion to sensitivity and keep the sum exact.

    Released rule: r_i = round(N r S_i / sum_j S_j); then the missing or surplus ranks go one by
    one to the module with the largest rank. If that meets every bound, it is the result. Otherwise
    (a departure: the release can give 0 or more than min(m, d)) r_i = round(clamp(c S_i, low,
    high)) with the c that spends the budget, and the same correction among the modules that can
    still move. Equal (or all zero) sensitivities get equal shares.

    Args:
        sensitivities: S_i >= 0, one per module.
        base_rank: r.
        bounds: bounds of each module's rank.

    Raises:
        ValueError: no module, lengths that differ, or a sensitivity that is negative, infinite
            or NaN.
    """
    shares = _shares(sensitivities)
    _check_lengths(shares, bounds)
    wanted = len(shares) * base_rank
    target = min(max(wanted, sum(b.low for b in bounds)), sum(b.high for b in bounds))
    unbounded = [RankBounds(0, wanted)] * len(shares)
    ranks = _settle([round(wanted * share) for share in shares], wanted, unbounded)
    if any(not b.low <= rank <= b.high for rank, b in zip(ranks, bounds, strict=True)):
        level = _level(shares, target, bounds, [1] * len(shares))
        ranks = _settle(
            [round(_clamp(level * s, b)) for s, b in zip(shares, bounds, strict=True)],
            target,
            bounds,
        )
    return RankAllocation(tuple(ranks), wanted, sum(ranks), target == wanted)


def allocate_ranks_by_cost(
    sensitivities: Sequence[float],
    base_rank: int,
    bounds: Sequence[RankBounds],
    costs: Sequence[int],
) -> RankAllocation:
    """Allocate ranks in proportion to sensitivity within a budget of trainable parameters.

    sum_i k_i r_i <= r sum_i k_i, with k_i the trainable parameters per rank of module i (m_i if A
    is frozen). r_i = clamp(c S_i, low, high), rounded down with the c that spends the budget; the
    remainder goes, one rank at a time, to the module furthest below its share whose cost still
    fits. The release does not do this and lets the parameter count drift with the ranks; the paper
    describes a fixed parameter budget.

    Args:
        sensitivities: S_i >= 0, one per module.
        base_rank: r.
        bounds: bounds of each module's rank.
        costs: k_i > 0.

    Raises:
        ValueError: as in `allocate_ranks`.
    """
    shares = _shares(sensitivities)
    _check_lengths(shares, bounds)
    _check_lengths(shares, costs)
    wanted = base_rank * sum(costs)
    least = sum(k * b.low for k, b in zip(costs, bounds, strict=True))
    level = _level(shares, wanted, bounds, costs)
    ideal = [_clamp(level * s, b) for s, b in zip(shares, bounds, strict=True)]
    ranks = [math.floor(x + 1e-9) for x in ideal]
    left = wanted - sum(k * rank for k, rank in zip(costs, ranks, strict=True))
    while True:
        fits = [i for i, b in enumerate(bounds) if ranks[i] < b.high and costs[i] <= left]
        if not fits:
            break
        # All are less than one rank apart, so each gets one in turn: whole rounds go at once.
        room = min(bounds[i].high - ranks[i] for i in fits)
        rounds = min(room, left // sum(costs[i] for i in fits))
        served = fits if rounds else [max(fits, key=lambda i: ideal[i] - ranks[i])]
        for i in served:
            ranks[i] += max(rounds, 1)
            left -= max(rounds, 1) * costs[i]
    return RankAllocation(tuple(ranks), wanted, wanted - left, least <= wanted)


def allocate_scales(
    sensitivities: Sequence[float], base_rank: int, alpha: float, rule: str
) -> tuple[float, ...]:
    """Return the scale s_i of each module's output: y = W x + s_i B_i A_i x.

    Rules:
        "released": alpha_i = max(alpha, round(N alpha S_i / sum_j S_j)), s_i = alpha_i / r. The
            divisor is the BASE rank r, not r_i, and a scale is only ever raised.
        "proportional": s_i = (alpha / r) S_i / mean_j S_j, which keeps the mean scale.
        "constant": s_i = alpha / r.

    Args:
        sensitivities: S_i >= 0, one per module.
        base_rank: r.
        alpha: the base alpha.
        rule: one of the names above.

    Raises:
        ValueError: as in `allocate_ranks`, or an unknown rule.
    """
    shares = _shares(sensitivities)
    total = len(shares) * alpha
    if rule == "released":
        return tuple(max(alpha, round(total * share)) / base_rank for share in shares)
    if rule == "proportional":
        return tuple(total * share / base_rank for share in shares)
    if rule == "constant":
        return (alpha / base_rank,) * len(shares)
    raise ValueError(f"unknown scale rule {rule!r}")


def _shares(sensitivities: Sequence[float]) -> list[float]:
    """Return S_i / sum_j S_j; equal shares where all S_i are zero.

    Raises:
        ValueError: no module, or a sensitivity that is negative, infinite or NaN.
    """
    values = [float(value) for value in sensitivities]
    if not values:
        raise ValueError("there are no modules to allocate ranks to")
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"sensitivity {index} is {value}, not a number of 0 or more")
    # Dividing by the largest value first keeps the sum finite and tiny values (1e-40) accurate.
    largest = max(values)
    if largest == 0:
        return [1 / len(values)] * len(values)
    scaled = [value / largest for value in values]
    # Smaller shares count as zero: rank / share, a breakpoint of `_level`, would overflow.
    scaled = [value if value > 1e-290 else 0.0 for value in scaled]
    total = math.fsum(scaled)
    return [value / total for value in scaled]


def _check_lengths(shares: Sequence[float], other: Sequence[object]) -> None:
    if len(shares) != len(other):
        raise ValueError(f"{len(shares)} sensitivities but {len(other)} bounds or costs")


def _clamp(value: float, bounds: RankBounds) -> float:
    return min(max(value, bounds.low), bounds.high)


def _level(
    shares: Sequence[float], budget: int, bounds: Sequence[RankBounds], costs: Sequence[int]
) -> float:
    """Return c with sum_i k_i clamp(c S_i, low_i, high_i) = budget (or the bound nearest to it).

    The sum is piecewise linear and nondecreasing in c: find the two neighboring breakpoints that
    bracket the budget, then interpolate.
    """
    modules = [m for m in zip(shares, bounds, costs, strict=True) if m[0] > 0]
    fixed = sum(k * b.low for s, b, k in zip(shares, bounds, costs, strict=True) if s == 0)

    def spent(level: float) -> float:
        return fixed + math.fsum(k * _clamp(level * s, b) for s, b, k in modules)

    points = sorted({0.0, *(limit / s for s, b, _ in modules for limit in (b.low, b.high))})
    first = bisect.bisect_left(points, float(budget), key=spent)
    if first == 0 or first == len(points):
        return points[min(first, len(points) - 1)]
    low, high = points[first - 1], points[first]
    below, above = spent(low), spent(high)
    return low + (high - low) * (budget - below) / (above - below)


def _settle(ranks: list[int], target: int, bounds: Sequence[RankBounds]) -> list[int]:
    """Move the sum to ``target``, one rank at a time at the largest rank that may still move."""
    ranks = _lowered(ranks, sum(ranks) - target, bounds)
    while (gap := target - sum(ranks)) != 0:
        step = 1 if gap > 0 else -1
        free = [
            i for i, b in enumerate(bounds) if (ranks[i] < b.high if step > 0 else ranks[i] > b.low)
        ]
        # Like the release's argmax, max keeps the first of equal values. A missing rank makes its
        # module the largest, which then gets the next one too.
        first = max(free, key=lambda i: ranks[i])
        ranks[first] += min(gap, bounds[first].high - ranks[first]) if step > 0 else step
    return ranks


def _lowered(ranks: list[int], surplus: int, bounds: Sequence[RankBounds]) -> list[int]:
    """Take from the largest ranks as long as all that are equally large can give one."""

    def cut(most: int) -> list[int]:
        return [max(min(r, most), min(r, b.low)) for r, b in zip(ranks, bounds, strict=True)]

    whole, low, high = sum(ranks), 0, max(ranks)
    while low < high:
        middle = (low + high) // 2
        if whole - sum(cut(middle)) <= surplus:
            high = middle
        else:
            low = middle + 1
    return cut(high)
