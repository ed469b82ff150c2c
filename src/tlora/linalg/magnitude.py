"""sum |W * G| for a gradient G that is never held whole.

Source: arXiv 2604.18124, section 3 (docs/method.md, 2), with G = dL_s/dW = delta_s^T X_s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Entries of G formed at once: half a megabyte stays in a core's cache, while an accelerator is
# faster with few large products.
_CPU_ENTRIES = 2**17
_DEVICE_ENTRIES = 2**26


def weighted_magnitude(weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return sum_jk |W_jk| |G_jk| with G = sum over pairs of delta^T x.

    Args:
        weight: |W|, m x d float32.
        pairs: (delta, x) of each call of the module on one sample: T x m and T x d float32.

    Returns:
        A scalar on the device of ``weight``.
    """
    rows, columns = weight.shape
    entries = _CPU_ENTRIES if weight.device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // columns)
    total = weight.new_zeros(())
    if not pairs:
        return total
    buffer = weight.new_empty(min(step, rows), columns)
    for start in range(0, rows, step):
        block = weight[start : start + step].contiguous()
        gradient = buffer[: len(block)]
        for index, (delta, x) in enumerate(pairs):
            part = delta[:, start : start + step].T
            torch.addmm(gradient, part, x, beta=float(index > 0), out=gradient)
        # |W| . |G| as an inner product: one pass over the block, where |W G| would take three.
        total += torch.dot(gradient.abs_().flatten(), block.flatten())
    return total
