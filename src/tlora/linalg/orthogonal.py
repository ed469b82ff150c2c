"""Orthonormal columns and eigenvectors of many matrices, without waiting for any one of them.

Cholesky QR: R^T R = Y^T Y, Q = Y R^(-1), two products and a factorization of a small matrix, where
Householder's QR goes column by column. The small matrices are in float64, so that float32 columns
of condition up to 1e7 pass, and those of equal size are factored as one batch. Whether a matrix
passed stays on its device, to be read with those of others. Source: Yamamoto, Nakatsukasa,
Yanagisawa, Fukaya 2015, "Roundoff error analysis of the CholeskyQR2 algorithm".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-7
"""Of R's diagonal, its columns scaled to length one: below it float64 leaves R no digit."""

_NEARLY_ORTHONORMAL = 0.1
"""The same of columns that one pass has orthonormalized, if that has worked."""


BATCH_BYTES = 2**29
"""What the matrices of modules that are solved together may take on an accelerator."""


BATCHED = {"cuda"}
"""Devices where Cholesky QR and batches pay: they compute in float64, and launches need no answer.
A CPU takes 1 to 3 times as long for a block by Cholesky QR as by Householder's."""


def batched(tensor: Tensor) -> bool:
    """Return whether Cholesky QR and batches serve a matrix: float32, on such a device."""
    return tensor.dtype == torch.float32 and tensor.device.type in BATCHED


def gram(block: Tensor) -> Tensor:
    """Return Y^T Y in float64, l x l, for Y, d x l."""
    wide = block.double()
    return wide.T @ wide


def inverse_factors(grams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return R^(-1), upper triangular, of each G = R^T R, and how well it is determined.

    Args:
        grams: l x l float64; columns are scaled to length one before they are factored.

    Returns:
        The l x l factors, and for each the least entry of R's diagonal, a scalar in [0, 1] on the
        device; 0 or NaN where there is no factorization.
    """

    def factored(stacked: Tensor) -> tuple[Tensor, Tensor]:
        tiny = torch.finfo(stacked.dtype).tiny
        scale = stacked.diagonal(dim1=-2, dim2=-1).clamp_min(tiny).rsqrt()
        lower, info = torch.linalg.cholesky_ex(stacked * scale[:, :, None] * scale[:, None, :])
        least = lower.diagonal(dim1=-2, dim2=-1).amin(dim=-1)
        eye = torch.eye(stacked.shape[-1], dtype=stacked.dtype, device=stacked.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        return scale[:, :, None] * inverse.mT, torch.where(info == 0, least, 0.0)

    pairs = _by_size(grams, factored)
    return [inverse for inverse, _ in pairs], [least for _, least in pairs]


def one_pass(blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return Q = Y R^(-1) of each Y, d x l float32, and how well it is determined.

    Where Cholesky QR does not serve (`batched`), Q is Householder's, and always well determined.
    Else one pass keeps the span, to float32 rounding, and leaves columns that are well conditioned
    where the second result is above `LEAST`: orthonormal to 1e-16 times the square of Y's
    condition, enough between two products, not for a basis.
    """
    if not all(map(batched, blocks)):
        return [torch.linalg.qr(block).Q for block in blocks], [
            block.new_ones((), dtype=torch.float64) for block in blocks
        ]
    inverses, least = inverse_factors([gram(block) for block in blocks])
    # To float64 and back one by one: the blocks may fill the memory.
    pairs = zip(blocks, inverses, strict=True)
    return [(block.double() @ inverse).to(block.dtype) for block, inverse in pairs], least


def orthonormal(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return d x l orthonormal columns with the span of each block, in the blocks' dtype.

    By Cholesky QR twice; by Householder's where that fails (columns that depend on each other to
    within 1e-7), or does not serve (`batched`). The host reads each device once.
    """
    if not all(map(batched, blocks)):
        return [torch.linalg.qr(block).Q for block in blocks]
    once, first = one_pass(blocks)
    twice, second = one_pass(once)
    passed = [well_determined(*pair) for pair in zip(first, second, strict=True)]
    triples = zip(blocks, twice, read(passed), strict=True)
    return [found if passed else torch.linalg.qr(block).Q for block, found, passed in triples]


def well_determined(first: Tensor, second: Tensor) -> Tensor:
    """Return whether two passes gave orthonormal columns, from what each said of its factor."""
    return (first > LEAST) & (second > _NEARLY_ORTHONORMAL)


def eigenpairs(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return eigenvalues, largest first, and eigenvectors as columns, of symmetric l x l matrices.

    Negative values (rounding errors of a Gram matrix) count as zero.
    """

    def solved(stacked: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh((stacked + stacked.mT) / 2)
        return values.flip(-1).clamp_min(0), vectors.flip(-1)

    return _by_size(matrices, solved)


def read(tensors: Sequence[Tensor]) -> list[Any]:
    """Return `tolist` of tensors of equal shape and dtype; each device is read once."""
    found: dict[int, Any] = {}
    for places in _places(tensors, lambda tensor: tensor.device):
        values = torch.stack([tensors[place] for place in places]).tolist()
        found |= dict(zip(places, values, strict=True))
    return [found[place] for place in range(len(tensors))]


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, of one dtype, on the CPU; each other device is read once."""
    found: dict[int, Tensor] = {}
    for places in _places(tensors, lambda tensor: tensor.device):
        some = [tensors[place] for place in places]
        if len(some) > 1 and some[0].device.type != "cpu":
            flat = torch.cat([tensor.flatten() for tensor in some]).cpu()
            parts = flat.split([tensor.numel() for tensor in some])
            # Copies, so that none keeps the others alive.
            some = [p.clone().view_as(tensor) for p, tensor in zip(parts, some, strict=True)]
        found |= {place: tensor.cpu() for place, tensor in zip(places, some, strict=True)}
    return [found[place] for place in range(len(tensors))]


def batches(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Yield ranges of neighbors whose sizes add up to ``limit`` at most, or of a larger one."""
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > limit:
            yield range(start, place)
            start, total = place, 0
        total += size
    if sizes:
        yield range(start, len(sizes))


def batch_bytes(device: torch.device) -> int:
    """Return what a batch may take on a device; 0 where more than one module gains nothing."""
    return BATCH_BYTES if device.type in BATCHED else 0


def _by_size(
    matrices: Sequence[Tensor], solve: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    def kind(matrix: Tensor) -> object:
        # LAPACK's bits depend on where in memory a matrix lies.
        together = matrix.device.type in BATCHED
        return (len(matrix), matrix.device) if together else id(matrix)

    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in _places(matrices, kind):
        first, second = solve(torch.stack([matrices[place] for place in places]))
        found |= {place: (first[i], second[i]) for i, place in enumerate(places)}
    return [found[place] for place in range(len(matrices))]


def _places(tensors: Sequence[Tensor], key: Callable[[Tensor], object]) -> list[list[int]]:
    """Return the places of the tensors of each kind."""
    kinds: dict[object, list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault(key(tensor), []).append(place)
    return list(kinds.values())
