"""Which learning rate of a method is reported: the rule, apart from everything else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

Scores = Mapping[float, Sequence[float | None]]
"""Validation scores by learning rate, a value for each tuning seed that has run; None: the run
failed or its score is no number."""


def means(scores: Scores, seeds: int) -> dict[float, float]:
    """Return the mean score of every rate at which all ``seeds`` runs have a score."""
    found = {}
    for rate, values in scores.items():
        known = [value for value in values if value is not None]
        if len(known) == seeds:
            found[rate] = statistics.fmean(known)
    return found


def best_rate(scores: Scores, seeds: int, better: str) -> float | None:
    """Return the learning rate with the best mean; of equal means the lowest rate.

    A rate at which one seed failed is out: its mean would be over other seeds than the rest's.

    Args:
        scores: by learning rate.
        seeds: how many tuning seeds there are.
        better: "higher" or "lower".
    """
    found = means(scores, seeds)
    sign = -1.0 if better == "higher" else 1.0
    return min(found, key=lambda rate: (sign * found[rate], rate), default=None)
