"""Matrices whose leading right singular vectors form a frozen basis, besides the paper's W C.

Each is a `FactoredMatrix`, factored while the second moment is still stored as input rows, so that
few tokens never require a d x d matrix. Sources: docs/method.md, 9; C alone: EVA, arXiv 2410.07170,
section 3 (which takes the inputs uncentered, and trains A). W C^(1/2) weighs directions by the
standard deviation of the inputs, where W C weighs them by the variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tlora.linalg.matrices import FactoredMatrix, full_precision
from tlora.linalg.moments import SecondMoment


@full_precision
def moment_itself(moment: SecondMoment, like: Tensor) -> FactoredMatrix:
    """Return C, d x d: its right singular vectors are its eigenvectors, largest first.

    Args:
        moment: C.
        like: gives the device and dtype of the product (W).
    """
    count, rows = max(moment.samples, 1), moment.rows
    if rows is None:
        return FactoredMatrix(moment.total().to(like).div_(count))
    rows = rows.to(like)
    return FactoredMatrix(rows.T / count, rows)


@full_precision
def half_weighted(weight: Tensor, moment: SecondMoment) -> FactoredMatrix:
    """Return W C^(1/2), m x d, with the symmetric root C^(1/2) = sum_k sqrt(l_k) v_k v_k^T.

    From T rows X / sqrt(n) of which C is the Gram matrix, v_k = X^T u_k / sqrt(n l_k) with the
    eigenvectors u_k of the T x T one; else by the eigenvectors of C. Eigenvalues below rounding
    (max(T, d) eps of the largest) count as zero.

    Args:
        weight: W, m x d; its dtype and device are those of the product.
        moment: C.
    """
    count, rows = max(moment.samples, 1), moment.rows
    if rows is None:
        matrix = moment.total().to(weight).div_(count)
        values, vectors = torch.linalg.eigh(matrix)
        kept = _above_rounding(values)
        directions = vectors[:, kept].T
    else:
        rows = rows.to(weight) / count**0.5
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        kept = _above_rounding(values)
        directions = (vectors[:, kept] / values[kept].sqrt()).T @ rows
    return FactoredMatrix((weight @ directions.T) * values[kept].sqrt(), directions)


def _above_rounding(values: Tensor) -> Tensor:
    """Mask the ascending eigenvalues of a semidefinite matrix that exceed rounding error."""
    if not len(values):
        return values > 0
    return values > values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps


def singular_part(weight: Tensor, rank: int, *, minor: bool = False) -> tuple[Tensor, Tensor]:
    """Return B = U_r S_r^(1/2) and A = S_r^(1/2) V_r^T, so that B A is a rank-r part of W = U S
    V^T.

    Args:
        weight: W, m x d float32.
        rank: r, how many singular components; at most min(m, d).
        minor: take the smallest components (the last r of the thin SVD) instead of the largest.

    Returns:
        B (m x r) and A (r x d), float32, in descending order of singular values.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    part = slice(len(s) - rank, None) if minor else slice(rank)
    root = s[part].sqrt()
    return u[:, part] * root, root[:, None] * vh[part]
