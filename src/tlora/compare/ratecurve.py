"""Validation score against learning rate: the best rate, and how many others come close to it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

Curve = Mapping[float, float | None]
"""Mean validation score by learning rate; None where a seed failed or diverged."""


def best_rate(curve: Curve, better: str) -> float | None:
    """Return the learning rate with the best score, of equal scores the lowest; None without any.

    Args:
        curve: the scores.
        better: "higher" or "lower".
    """
    losses = _losses(curve, better)
    return min(losses, key=lambda rate: (losses[rate], rate), default=None)


def geometric_median(rates: Sequence[float]) -> float:
    """Return the middle rate, or the geometric mean of the middle two to three digits.

    So a rate that was tried is returned to the last bit.

    Raises:
        StatisticsError: there is no rate.
    """
    low, high = statistics.median_low(rates), statistics.median_high(rates)
    return low if low == high else float(f"{math.sqrt(low * high):.3g}")


def width(curve: Curve, better: str, within: float = 0.05) -> tuple[float, bool] | None:
    """Return how wide the range of learning rates around the best is whose scores are close to it.

    Between rates that were tried the score is interpolated linearly over the logarithm of the rate.

    Args:
        curve: the scores.
        better: "higher" or "lower".
        within: how much worse a score may be, as a share of the best one.

    Returns:
        The highest rate of the range over its lowest, and whether the range reaches an end of the
        rates that were tried, so that it may be wider. None where nothing can be said: one rate,
        no score, or a best score of zero.
    """
    losses = _losses(curve, better)
    best = best_rate(curve, better)
    if best is None or losses[best] == 0 or len(curve) == 1:
        return None
    limit = losses[best] + within * abs(losses[best])
    rates = sorted(curve)
    place = rates.index(best)
    low, low_open = _edge(losses, rates[place::-1], limit)
    high, high_open = _edge(losses, rates[place:], limit)
    return high / low, low_open or high_open


def _losses(curve: Curve, better: str) -> dict[float, float]:
    """Return the scores that there are, turned so that lower is better."""
    sign = -1.0 if better == "higher" else 1.0
    return {rate: sign * score for rate, score in curve.items() if score is not None}


def _edge(
    losses: Mapping[float, float], outward: Sequence[float], limit: float
) -> tuple[float, bool]:
    """Return where the loss first exceeds ``limit``, and whether the rates end before that."""
    for inner, outer in itertools.pairwise(outward):
        if outer not in losses:
            return inner, False
        if losses[outer] > limit:
            share = (limit - losses[inner]) / (losses[outer] - losses[inner])
            return inner * (outer / inner) ** share, False
    return outward[-1], True
