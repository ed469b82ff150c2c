"""Statistics of two models on the same items.

Items are resampled, not models: the intervals describe other items of the same kind, not another
training run.

Difference of means: the percentile bootstrap (Efron 1979) over items, resampling both models'
scores of an item together. BCa limits fail if few items changed: for equal models that differ on
8 % of 50 items they exclude zero in 10 % of the cases, percentile limits in 5 %
(benchmarks/quality/intervals.py). With some hundred items or more, the two agree.

Test: random sign flips of the differences (Fisher's paired randomization test), which for
right-or-wrong scores is McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlora.report.intervals import LEVEL, Difference, Interval

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 10_000
SEED = 0
_FEW = 32  # up to this many distinct values, drawing counts is faster than drawing items
BLOCK = 2**22  # numbers per block of resamples: 32 MiB


@dataclass(frozen=True)
class Scores:
    """The scores of one model on the items of a task, in the same order for all models."""

    values: Sequence[float]
    groups: Sequence[str] | None = None
    """Items of one group, such as the turns of a conversation, are resampled together."""


def score(scores: Scores) -> Interval:
    """Return the mean and its 95 % interval; a single item has no interval.

    Uses Wilson's interval (1927) for right-or-wrong scores, which does not shrink to a point if all
    or none are right; otherwise the percentile bootstrap.
    """
    count = len(scores.values)
    mean = math.fsum(scores.values) / count
    if count < 2:
        return Interval(mean, None, None, count)
    if scores.groups is None and {*scores.values} <= {0.0, 1.0}:
        return Interval(mean, *_wilson(mean, count), count)
    return Interval(mean, *_limits(*_totals(scores.values, scores.groups)), count)


def difference(first: Scores, second: Scores) -> Difference | None:
    """Compare two models on the same items, first minus second; higher is better.

    One is better if the interval excludes zero and the test has p < 0.05, which never happens with
    five changed items or fewer.

    Args:
        first: scores of one model.
        second: scores of the other, item for item, with the same groups.

    Returns:
        None for fewer than two items.
    """
    count = len(first.values)
    if count < 2:
        return None
    # Round, because 0.3 - 0.2 and 0.2 - 0.1 would otherwise differ.
    pairs = zip(first.values, second.values, strict=True)
    differences = [round(a - b, 12) for a, b in pairs]
    totals, sizes = _totals(differences, first.groups)
    low, high = _limits(totals, sizes)
    p = sign_flip(totals)
    return judged(Interval(math.fsum(differences) / count, low, high, count), p)


def judged(found: Interval, p: float) -> Difference:
    """Return a difference of two models; one is better if interval and test agree."""
    assert found.low is not None
    assert found.high is not None
    better = 0
    if p < 1 - LEVEL and not found.low <= 0 <= found.high:
        better = 1 if found.mean > 0 else -1
    return Difference(found, p, better)


def sign_flip(differences: np.ndarray) -> float:
    """Return the two-sided p-value of symmetric differences, given their magnitudes.

    Exact if all nonzero differences have the same magnitude (McNemar 1947: twice the binomial tail
    of the rarer sign); otherwise from `RESAMPLES` random flips, at least 1 / (RESAMPLES + 1).

    Args:
        differences: one per group (or item, without groups), float64 of any length.
    """
    import numpy as np

    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    if len(sizes) == 1:
        from scipy import stats

        rarer = min((differences > 0).sum(), (differences < 0).sum())
        return min(1.0, 2 * float(stats.binom.cdf(rarer, counts[0], 0.5)))
    generator = np.random.default_rng(SEED)
    beyond = 0
    seen = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    for rows in _blocks(len(sizes)):
        ups = generator.binomial(counts, 0.5, size=(rows, len(sizes)))
        beyond += int((np.abs((2 * ups - counts) @ sizes) >= seen).sum())
    return (1 + beyond) / (1 + RESAMPLES)


def resampled_means(totals: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return `RESAMPLES` bootstrap means over groups, with a fixed seed.

    A mean is sum(totals) / sum(sizes) over the drawn groups.

    Args:
        totals: sum of the values of each group, float64 of shape (groups,).
        sizes: number of values of each group, same shape.
    """
    import numpy as np

    generator = np.random.default_rng(SEED)
    count = len(totals)
    kinds, numbers = np.unique(np.stack([totals, sizes], axis=1), axis=0, return_counts=True)
    if len(kinds) <= _FEW:
        # The counts of each kind of group are multinomial, so draw counts instead of groups.
        drawn = generator.multinomial(count, numbers / count, size=RESAMPLES) @ kinds
        return drawn[:, 0] / drawn[:, 1]
    means = []
    for rows in _blocks(count):
        drawn = generator.integers(count, size=(rows, count), dtype=np.int32)
        means.append(totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _totals(values: Sequence[float], groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of values per group."""
    import numpy as np

    if groups is None:
        return np.asarray(values, dtype=np.float64), np.ones(len(values))
    place = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    where = [place[group] for group in groups]
    return np.bincount(where, weights=values).round(12), np.bincount(where).astype(np.float64)


def _limits(totals: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return the percentile limits, rounded outward to the next mean."""
    import numpy as np

    means = resampled_means(totals, sizes).round(12)
    tail = (1 - LEVEL) / 2
    low = np.quantile(means, tail, method="lower")
    return float(low), float(np.quantile(means, 1 - tail, method="higher"))


def _wilson(share: float, count: int) -> tuple[float, float]:
    from scipy import stats

    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count)
    half *= math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # At a share of 0 or 1 the limit equals that share, up to the last digit.
    return max(0.0, round(middle - half, 12)), min(1.0, round(middle + half, 12))


def _blocks(width: int) -> list[int]:
    """Split the resamples into blocks of at most `BLOCK` numbers."""
    most = max(1, BLOCK // width)
    whole, rest = divmod(RESAMPLES, most)
    return [most] * whole + [rest] * bool(rest)
