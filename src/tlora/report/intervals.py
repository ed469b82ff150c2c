"""Statistics over a few seeds: intervals of a mean, and of the difference of two methods.

All intervals are Student's: mean -+ t s / sqrt(n), with the sample's standard deviation s and the
quantile t of n - 1 degrees of freedom. They cover the next seed on the same rows, not other rows.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
FEWEST = 3  # two differences of rounded scores agree too often by chance


@dataclass(frozen=True)
class Interval:
    """A mean over seeds or items, with its interval if there are enough."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Difference:
    """First method or model minus second, paired by seed or item."""

    interval: Interval
    p: float | None
    """Two-sided p-value of the paired test; None without spread."""
    better: int
    """1: the first is better beyond the noise; -1: the second; 0: neither (a tie)."""


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of ``values`` and its Student interval.

    One value has no interval.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    from scipy import stats

    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * _error(values)
    return Interval(mean, mean - half, mean + half, count)


def difference(
    first: Mapping[int, float], second: Mapping[int, float], better: str
) -> Difference | None:
    """Compare two methods over their shared seeds; None if they share none.

    Runs with the same seed share the row order and the new head, so paired differences vary less
    than scores. A difference is a tie if its interval contains zero, there are fewer than three
    pairs, or there is no spread, which gives no estimate of the noise.

    Args:
        first: score by seed.
        second: score by seed.
        better: "higher" or "lower".
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    found = interval(differences)
    if found.count < FEWEST or _error(differences) <= 1e-12 * max(1.0, abs(found.mean)):
        return Difference(found, None, 0)
    from scipy import stats

    error = _error(differences)
    p = float(2 * stats.t.sf(abs(found.mean) / error, found.count - 1))
    if p >= 1 - LEVEL:
        return Difference(found, p, 0)
    sign = 1 if found.mean > 0 else -1
    return Difference(found, p, sign if better == "higher" else -sign)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Return which of several tests are significant together (Holm 1979), with a family-wise error
    rate of 5 %."""
    alpha = 1 - LEVEL
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    limits = (p_values[index] <= alpha / (len(order) - rank) for rank, index in enumerate(order))
    holding = set(itertools.islice(order, sum(1 for _ in itertools.takewhile(bool, limits))))
    return [index in holding for index in range(len(p_values))]


def _error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))
