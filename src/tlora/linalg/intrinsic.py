"""Intrinsic dimension of a point cloud, from each point's two nearest neighbors."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = 0.9
"""Share of the points used in the fit; the largest ratios deviate from the line and are dropped."""
LEAST_POINTS = 3


def two_nn(points: Tensor) -> float:
    """Return the intrinsic dimension d of points by TwoNN.

    mu = r_2 / r_1, the ratio of the distances to a point's second and first neighbor, has the
    distribution F(mu) = 1 - mu^(-d) if the density is constant up to the second neighbor. So d is
    the slope of the line through the origin that fits -log(1 - F) to log mu, with F = i / n for the
    i-th smallest of n ratios; the largest tenth of them is left out.

    Source: Facco et al., Scientific Reports 7, 12140 (2017).

    Args:
        points: n x d; duplicates count once.

    Raises:
        ValueError: fewer than `LEAST_POINTS` points are distinct, or all neighbors are equally far.
    """
    different = torch.unique(points.double(), dim=0)
    count = len(different)
    if count < LEAST_POINTS:
        raise ValueError(f"too few distinct points ({count})")
    nearest = torch.cdist(different, different, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = nearest.fill_diagonal_(torch.inf).topk(2, largest=False).values
    ratios = (nearest[:, 1] / nearest[:, 0]).log().sort().values
    kept = max(int(_KEPT * count), 1)
    steps = torch.arange(1, kept + 1, dtype=torch.float64, device=ratios.device) / count
    x, y = ratios[:kept], -torch.log1p(-steps)
    if not x.any():
        raise ValueError("the two nearest neighbors of every point are equally far away")
    return float(x @ y / (x @ x))
