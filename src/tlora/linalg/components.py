"""A part of a matrix's singular value decomposition, as the product of two balanced factors."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_part(weight: Tensor, rank: int, *, minor: bool = False) -> tuple[Tensor, Tensor]:
    """Return B = U_r S_r^(1/2) and A = S_r^(1/2) V_r^T, so that B A is a part of W = U S V^T.

    Args:
        weight: W, m x d float32.
        rank: r, how many singular components; at most min(m, d).
        minor: take the smallest ones (the last r of the thin decomposition), not the largest.

    Returns:
        B (m x r) and A (r x d), float32, in descending order of singular values.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    part = slice(len(s) - rank, None) if minor else slice(rank)
    root = s[part].sqrt()
    return u[:, part] * root, root[:, None] * vh[part]
