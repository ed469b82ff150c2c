"""sum |W * G_s| or sum G_s^2 of each sample, for gradients G_s that are never held whole.

Source: arXiv 2604.18124, section 3 (docs/method.md, 2), with G_s = dL_s/dW = delta_s^T X_s; the
squares are not in the paper (docs/method.md, 9).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tlora.linalg.precision import full_precision

# Entries of G formed at once: a megabyte stays in a core's cache, while an accelerator is faster
# with few large products.
_CPU_ENTRIES = 2**18
_DEVICE_ENTRIES = 2**26

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(delta, x) of each call of the module on one sample: T x m and T x d float32."""


@full_precision
def weighted_magnitude(weight: Tensor, samples: Sequence[Pairs]) -> Tensor:
    """Return sum_jk |W_jk| |G_s,jk| of each sample, with G_s = sum over its pairs of delta^T x.

    W is gone through block of rows by block of rows, all samples on each, so that neither |W| nor
    any G_s is ever whole.

    Args:
        weight: W, m x d float32.
        samples: the pairs of each sample.

    Returns:
        A value per sample, on the device of ``weight``; 0 without pairs.
    """
    rows, columns = weight.shape
    entries = _CPU_ENTRIES if weight.device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // columns)
    totals = weight.new_zeros(len(samples))
    buffer = weight.new_empty(min(step, rows), columns)
    for start in range(0, rows, step):
        # `contiguous` for a transposed view; `abs` makes the block's own copy in either case.
        block = weight[start : start + step].abs().contiguous().flatten()
        gradient = buffer[: len(block) // columns]
        for total, pairs in zip(totals, samples, strict=True):
            for index, (delta, x) in enumerate(pairs):
                part = delta[:, start : start + step].T
                torch.addmm(gradient, part, x, beta=float(index > 0), out=gradient)
            if pairs:
                # |W| . |G| as an inner product: one pass over the block, where |W G| takes three.
                total.add_(torch.dot(gradient.abs_().flatten(), block))
    return totals


@full_precision
def squared_norm(samples: Sequence[Pairs]) -> Tensor:
    """Return ||G_s||_F^2 of each sample, with G_s = sum over its pairs of delta^T x.

    With few tokens by two Gram matrices, T x T, over the tokens of all pairs:
    ||delta^T x||_F^2 = sum_tu (delta delta^T)_tu (x x^T)_tu; else block of rows by block of rows.

    Args:
        samples: the pairs of each sample; one of them at least has one.

    Returns:
        A value per sample, float32 on the device of the pairs; 0 without pairs.
    """
    like = next(delta for pairs in samples for delta, _ in pairs)
    totals = like.new_zeros(len(samples))
    for total, pairs in zip(totals, samples, strict=True):
        if pairs:
            delta, x = (torch.cat(rows) for rows in zip(*pairs, strict=True))
            total.copy_(_squared_norm(delta, x))
    return totals


def _squared_norm(delta: Tensor, x: Tensor) -> Tensor:
    tokens, rows, columns = len(delta), delta.shape[1], x.shape[1]
    if tokens * (rows + columns) <= rows * columns:
        return (delta @ delta.T).mul_(x @ x.T).sum().clamp_min(0)
    entries = _CPU_ENTRIES if delta.device.type == "cpu" else _DEVICE_ENTRIES
    blocks = delta.split(max(1, entries // columns), dim=1)
    return torch.stack([(block.T @ x).square().sum() for block in blocks]).sum()
