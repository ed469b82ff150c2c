"""How far two calibrations agree: in the order of sensitivities, in ranks, in subspaces.

Pure arithmetic on what a calibration leaves: S_i by module, and A_i with orthonormal rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from tlora import Calibration, ModuleStatistics
from tlora.linalg.allocation import RankBounds, allocate_ranks
from tlora.linalg.moments import SecondMoment


class Measured(NamedTuple):
    """What is kept of one calibration."""

    sensitivity: dict[str, float]
    """S_i by module."""
    shape: dict[str, tuple[int, int]]
    """(m, d) of each weight."""
    basis: dict[str, Tensor]
    """The leading r right singular vectors of W C, r x d, by module."""


def overlap(one: Tensor, other: Tensor) -> float:
    """Return the mean squared cosine of the principal angles, ||A1 A2^T||_F^2 / r, in [0, 1].

    Args:
        one: A1, r x d with orthonormal rows.
        other: A2, likewise.
    """
    return float((one.double() @ other.double().T).square().sum()) / len(one)


def ranks(measured: Measured, base_rank: int) -> list[int]:
    """Return the ranks of the paper's rule, in the order of the modules."""
    bounds = [RankBounds(1, min(shape)) for shape in measured.shape.values()]
    return list(allocate_ranks(list(measured.sensitivity.values()), base_rank, bounds).ranks)


def agreement(one: Measured, other: Measured) -> dict[str, float]:
    """Return how far two calibrations of the same modules agree.

    Returns:
        "spearman": rank correlation of S over modules; "equal_ranks": share of modules that get the
        same rank by the paper's rule; "moved_ranks": share of all ranks that another module has;
        "overlap" and "lowest_overlap": of the subspaces, mean and least over modules.
    """
    base_rank = len(next(iter(one.basis.values())))
    mine, theirs = ranks(one, base_rank), ranks(other, base_rank)
    overlaps = [overlap(one.basis[name], other.basis[name]) for name in one.basis]
    pairs = list(zip(mine, theirs, strict=True))
    sensitivities = [list(each.sensitivity.values()) for each in (one, other)]
    return {
        "spearman": float(spearmanr(*sensitivities).statistic),
        "equal_ranks": sum(a == b for a, b in pairs) / len(pairs),
        "moved_ranks": sum(abs(a - b) for a, b in pairs) / (2 * sum(mine)),
        "overlap": sum(overlaps) / len(overlaps),
        "lowest_overlap": min(overlaps),
    }


def by_chance(measured: Measured) -> float:
    """Return the overlap of two random subspaces of these sizes: the mean of r / d."""
    shares = [len(basis) / basis.shape[1] for basis in measured.basis.values()]
    return sum(shares) / len(shares)


def concentration(measured: Measured) -> dict[str, float]:
    """Return how unevenly S lies over modules.

    Returns:
        "top_tenth": the share of the sum of S in the tenth of the modules where it is largest (a
        tenth, if S is even); "modules_of_half": the share of modules that hold half of it.
    """
    values = sorted(measured.sensitivity.values(), reverse=True)
    total, held, count = sum(values), 0.0, 0
    while held < total / 2:
        held, count = held + values[count], count + 1
    tenth = max(1, round(len(values) / 10))
    return {"top_tenth": sum(values[:tenth]) / total, "modules_of_half": count / len(values)}


def mean_agreement(pairs: Iterable[tuple[Measured, Measured]]) -> dict[str, float] | None:
    """Return the mean of `agreement` over pairs, and their number; None where there is no pair."""
    found = [agreement(one, other) for one, other in pairs]
    if not found:
        return None
    means = {key: round(sum(f[key] for f in found) / len(found), 4) for key in found[0]}
    return means | {"pairs": len(found)}


def pooled(one: Calibration, other: Calibration) -> Calibration:
    """Return the statistics of both calibrations' samples together.

    Each statistic is a mean over samples (of which the second moment keeps the sum), so pooling is
    exact: it equals one calibration of all samples, but for rounding.
    """
    samples = one.samples + other.samples
    moments: dict[int, SecondMoment] = {}
    modules = {}
    for name, mine in one.modules.items():
        theirs = other.modules[name]
        if mine.moment_id not in moments:
            moments[mine.moment_id] = _summed(mine.moment, theirs.moment)
        means = [float(each.require("sensitivity")) * each.samples for each in (mine, theirs)]
        modules[name] = ModuleStatistics(
            name,
            mine.d_in,
            mine.d_out,
            samples,
            sum(means) / samples,
            moments[mine.moment_id],
            mine.moment_id,
        )
    return Calibration(modules, samples)


def _summed(one: Any, other: Any) -> SecondMoment:
    parts = {
        "means": torch.cat([one.weighted_means, other.weighted_means]),
        "scatter": one.scatter.numbers + other.scatter.numbers,
    }
    counts = (one.samples + other.samples, one.tokens + other.tokens)
    return SecondMoment.from_parts(parts, *counts)
