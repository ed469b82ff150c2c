"""Orthonormal columns and eigenvectors of many matrices, without synchronizing for each.

Cholesky QR: R^T R = Y^T Y, Q = Y R^(-1), two products and a factorization of a small matrix, while
Householder QR works column by column. The small matrices are in float64, so that float32 columns of
condition up to 1e7 pass, and those of equal size are factored as one batch. The flag whether a
matrix passed stays on its device and is read together with the others. Source: Yamamoto,
Nakatsukasa, Yanagisawa, Fukaya 2015, "Roundoff error analysis of the CholeskyQR2 algorithm".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-7
"""Limit for R's diagonal, with columns scaled to length one: below it, float64 leaves R no correct
digit."""

_NEARLY_ORTHONORMAL = 0.1
"""The same limit for columns that one successful pass has orthonormalized."""


BATCH_BYTES = 2**29
"""Bytes that the matrices of modules solved together may take on an accelerator."""


BATCHED = {"cuda"}
"""Devices where Cholesky QR and batches pay off: they compute in float64 and launch asynchronously.
On a CPU, Cholesky QR of a block takes 1 to 3 times as long as Householder QR."""


def batched(tensor: Tensor) -> bool:
    """Return whether Cholesky QR and batches apply to a matrix: float32, on such a device."""
    return tensor.dtype == torch.float32 and tensor.device.type in BATCHED


def gram(block: Tensor) -> Tensor:
    """Return Y^T Y in float64, l x l, for Y, d x l."""
    wide = block.double()
    return wide.T @ wide


def inverse_factors(grams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return R^(-1), upper triangular, of each G = R^T R, and how well R is determined.

    Args:
        grams: l x l float64; columns are scaled to length one before they are factored.

    Returns:
        The l x l factors, and for each the smallest entry of R's diagonal, a scalar in [0, 1] on
        the device; 0 or NaN if the factorization failed.
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
    """Return Q = Y R^(-1) of each Y, d x l float32, and how well R is determined.

    Without Cholesky QR (`batched`), Q comes from Householder QR and is always well determined. With
    it, one pass keeps the span, to float32 rounding, and leaves well-conditioned columns
    if the second result is above `LEAST`: orthonormal to 1e-16 times the square of Y's
    condition number, which is enough between two products but not for a basis.
    """
    if not all(map(batched, blocks)):
        return [torch.linalg.qr(block).Q for block in blocks], [
            block.new_ones((), dtype=torch.float64) for block in blocks
        ]
    inverses, least = inverse_factors([gram(block) for block in blocks])
    # Converted to float64 and back one at a time, since the blocks may fill the memory.
    pairs = zip(blocks, inverses, strict=True)
    return [(block.double() @ inverse).to(block.dtype) for block, inverse in pairs], least


def orthonormal(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return d x l orthonormal columns with the span of each block, in the blocks' dtype.

    Runs Cholesky QR twice. Falls back to Householder QR if that fails (columns dependent to within
    1e-7) or does not apply (`batched`). Reads each device once.
    """
    if not all(map(batched, blocks)):
        return [torch.linalg.qr(block).Q for block in blocks]
    once, first = one_pass(blocks)
    twice, second = one_pass(once)
    passed = [well_determined(*pair) for pair in zip(first, second, strict=True)]
    triples = zip(blocks, twice, read(passed), strict=True)
    return [found if passed else torch.linalg.qr(block).Q for block, found, passed in triples]


def well_determined(first: Tensor, second: Tensor) -> Tensor:
    """Return whether two passes gave orthonormal columns, from the diagonals of both factors."""
    return (first > LEAST) & (second > _NEARLY_ORTHONORMAL)


def eigenpairs(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return eigenvalues, largest first, and eigenvectors as columns, of symmetric l x l matrices.

    Negative values (rounding errors of a Gram matrix) become zero.
    """

    def solved(stacked: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh((stacked + stacked.mT) / 2)
        return values.flip(-1).clamp_min(0), vectors.flip(-1)

    return _by_size(matrices, solved)


def read(tensors: Sequence[Tensor]) -> list[Any]:
    """Return `tolist` of tensors of equal shape and dtype; reads each device once."""
    found: dict[int, Any] = {}
    for places in _places(tensors, lambda tensor: tensor.device):
        values = torch.stack([tensors[place] for place in places]).tolist()
        found |= dict(zip(places, values, strict=True))
    return [found[place] for place in range(len(tensors))]


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, of one dtype, on the CPU; reads each other device once."""
    found: dict[int, Tensor] = {}
    for places in _places(tensors, lambda tensor: tensor.device):
        some = [tensors[place] for place in places]
        if len(some) > 1 and some[0].device.type != "cpu":
            flat = torch.cat([tensor.flatten() for tensor in some]).cpu()
            parts = flat.split([tensor.numel() for tensor in some])
            # Copies, so that no tensor keeps the others alive.
            some = [p.clone().view_as(tensor) for p, tensor in zip(parts, some, strict=True)]
        found |= {place: tensor.cpu() for place, tensor in zip(places, some, strict=True)}
    return [found[place] for place in range(len(tensors))]


def batches(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Yield ranges of consecutive items with a total size of at most ``limit``, or one item."""
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > limit:
            yield range(start, place)
            start, total = place, 0
        total += size
    if sizes:
        yield range(start, len(sizes))


def batch_bytes(device: torch.device) -> int:
    """Return the bytes that a batch may take on a device; 0 if batching gains nothing."""
    return BATCH_BYTES if device.type in BATCHED else 0


def _by_size(
    matrices: Sequence[Tensor], solve: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    def kind(matrix: Tensor) -> object:
        # LAPACK's bits depend on the memory alignment of a matrix.
        together = matrix.device.type in BATCHED
        return (len(matrix), matrix.device) if together else id(matrix)

    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in _places(matrices, kind):
        first, second = solve(torch.stack([matrices[place] for place in places]))
        found |= {place: (first[i], second[i]) for i, place in enumerate(places)}
    return [found[place] for place in range(len(matrices))]


def _places(tensors: Sequence[Tensor], key: Callable[[Tensor], object]) -> list[list[int]]:
    """Return the positions of the tensors of each kind."""
    kinds: dict[object, list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault(key(tensor), []).append(place)
    return list(kinds.values())
