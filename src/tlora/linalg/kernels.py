"""sum |W * G_s| of each sample in one kernel that never writes G_s to memory.

Imported only where the kernel is used, because it needs Triton, which ships with torch's CUDA
builds. `gradients.batched_magnitude` computes the same values and is its reference in tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile, tokens per step, tiles of rows that run side by side. These are not
# autotuned: the choice could change the order of sums between runs.
_HOPPER = (128, 256, 64, 8)
"""Uses 144 KiB of shared memory, and all registers of a thread except with a 16-bit W."""

_OTHERS = (128, 128, 32, 8)

_STAGES = 3


@triton.jit(do_not_specialize=["samples"])  # type: ignore[untyped-decorator]
def _weighted_magnitudes(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    weight, delta, x, offsets, parts, samples, m, d, weight_row, weight_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Programs that run together share tiles of delta and x: GROUP tiles of rows at a time.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(d, BN)
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    j = (first + within % height) * BM + tl.arange(0, BM)
    k = (within // height) * BN + tl.arange(0, BN)
    # int64: m d and tokens d may exceed 31 bits.
    places = j[:, None].to(tl.int64) * weight_row + k[None, :].to(tl.int64) * weight_column
    inside = (j[:, None] < m) & (k[None, :] < d)
    for sample in range(samples):
        start, end = tl.load(offsets + sample), tl.load(offsets + sample + 1)
        gradient = tl.zeros((BM, BN), tl.float32)
        for token in range(start, end, BK):
            t = token + tl.arange(0, BK)
            row = t[:, None].to(tl.int64)
            left = tl.load(
                delta + row * m + j[None, :], mask=(t[:, None] < end) & (j[None, :] < m), other=0.0
            )
            right = tl.load(
                x + row * d + k[None, :], mask=(t[:, None] < end) & (k[None, :] < d), other=0.0
            )
            gradient = tl.dot(tl.trans(left), right, gradient, input_precision="ieee")
        # Reloaded for each sample: the sums need the registers that keeping it would take.
        tile = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(tl.abs(tile) * tl.abs(gradient))
        tl.store(parts + sample * (tiles_m * tiles_n) + program, total)


def weighted_magnitudes(weight: Tensor, delta: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Return sum_jk |W_jk| |G_s,jk| of each sample, with G_s = delta^T x over the sample's tokens.

    Args:
        weight: W, m x d float32, bfloat16 or float16, of any strides.
        delta: tokens x m, float32, bfloat16 or float16, contiguous.
        x: tokens x d, the same.
        offsets: where each sample begins, and how many tokens there are: S + 1 int32.
    """
    (m, d), samples = weight.shape, len(offsets) - 1
    high, wide, deep, group = _tiles(weight)
    tiles = triton.cdiv(m, high) * triton.cdiv(d, wide)
    # One number for each tile and sample, added up in one order: atomic sums would have none.
    parts = torch.empty(samples, tiles, device=weight.device)
    with torch.cuda.device_of(weight):
        _weighted_magnitudes[(tiles,)](
            *(weight, delta, x, offsets, parts, samples, m, d, *weight.stride()),
            *(high, wide, deep, group),
            num_warps=8,
            num_stages=_STAGES,
        )
    return parts.sum(dim=1)


def _tiles(weight: Tensor) -> tuple[int, int, int, int]:
    if weight.device.type == "cuda" and weight.itemsize == 2:
        found = torch.cuda.get_device_properties(weight.device)
        if (found.major, found.minor) == (9, 0):
            return _HOPPER
    return _OTHERS
