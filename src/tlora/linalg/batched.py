"""Leading right singular vectors of many matrices at once, from products and small factorizations.

A small matrix is solved through the eigenvectors of its smaller Gram matrix, a large one through a
sketch: subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4) with Cholesky QR, then
Rayleigh-Ritz by the eigenvectors of (M V)^T (M V). Gram matrices are float64, so singular values
are accurate down to 1e-8 of the largest, below the rounding error of a float32 matrix.

Nothing here synchronizes with the device. If a factorization failed, `Leading.passed` is false.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.linalg.matrices import FactoredMatrix
from tlora.linalg.orthogonal import (
    LEAST,
    batched,
    eigenpairs,
    gram,
    inverse_factors,
    one_pass,
    well_determined,
)
from tlora.linalg.singular import Solver, fix_signs, gaussian, rounding

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Leading:
    """Leading right singular vectors.

    Attributes:
        vectors: r x d float32, orthonormal rows; fewer where M is a product over fewer inner
            columns. Rows whose singular value is rounding error are arbitrary.
        values: their singular values, float64, descending.
        passed: whether each factorization worked, a scalar on the device.
        energy: ||M||_F^2, a float64 scalar on the device.
    """

    vectors: Tensor
    values: Tensor
    passed: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Sketch:
    """Inputs of Rayleigh-Ritz, kept after M is freed.

    Attributes:
        rank: r.
        block: V, d x l float32, well-conditioned columns.
        inner: V^T V, float64; None if Householder QR left V orthonormal.
        image: (M V)^T (M V), float64.
        least: of the factors that made V (`one_pass`).
        energy: ||M||_F^2.
    """

    rank: int
    block: Tensor
    inner: Tensor | None
    image: Tensor
    least: Tensor
    energy: Tensor


def solvable(product: FactoredMatrix, method: str) -> bool:
    """Return whether this file solves a matrix at least as fast as `right_singular_vectors`.

    It needs float64. On a CPU, the SVD of a square matrix is faster than the eigenvectors.
    """
    rows, columns = product.left.shape
    if batched(product.left):
        return columns > 0
    on_cpu = product.left.dtype == torch.float32 and product.left.device.type == "cpu"
    long = max(rows, columns) >= 2 * min(rows, columns) >= 256
    return on_cpu and (method != "exact" or long)


def exact(products: Sequence[FactoredMatrix], ranks: Sequence[int]) -> list[Leading]:
    """Return the leading singular vectors of matrices that need no sketch.

    Args:
        products: M, m x d float32.
        ranks: r of each.
    """
    reduced = [product.reduced() for product in products]
    grams = [gram(narrow if _is_tall(narrow) else narrow.T) for narrow, _ in reduced]
    passed = [matrix.isfinite().all() for matrix in grams]
    pairs = eigenpairs([matrix.nan_to_num(0, 0, 0) for matrix in grams])
    rows, values, inner = [], [], []
    for product, rank, (narrow, _), (squares, vectors) in zip(
        products, ranks, reduced, pairs, strict=True
    ):
        sigma = squares[:rank].sqrt()
        each = vectors[:, :rank].T
        if not _is_tall(narrow):
            # V^T = S^(-1) U^T M: small rows are orthonormal only to 1e-16 (sigma_1 / sigma)^2.
            each = each / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[:, None] @ narrow.double()
        determined = sigma > rounding(product.shape, product.left.dtype) * sigma[:1]
        rows.append(torch.where(determined[:, None], each, 0.0))
        values.append(sigma)
        inner.append(gram(rows[-1].T) + (~determined).double().diag())
    inverses, least = inverse_factors(inner)
    found = []
    for i, (_, basis) in enumerate(reduced):
        vectors = (inverses[i].T @ rows[i]).float()
        vectors = fix_signs(vectors if basis is None else vectors @ basis.T)
        fine = passed[i] & (least[i] > LEAST)
        found.append(Leading(vectors, values[i], fine, products[i].energy()))
    return found


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] >= matrix.shape[1]


def sketched(
    products: Sequence[FactoredMatrix], ranks: Sequence[int], solver: Solver
) -> list[Sketch]:
    """Return well-conditioned columns V close to the leading singular vectors, and their image.

    Args:
        products: M, m x d float32.
        ranks: r of each.
        solver: width and seed of the sketches, and the number of times M^T M is applied.
    """
    starts = [_start(*pair, solver) for pair in zip(products, ranks, strict=True)]
    blocks, least = one_pass(_each(FactoredMatrix.transposed_times, products, starts))
    for number in range(solver.iterations):
        left = _each(FactoredMatrix.times, products, blocks)
        if number:
            # The columns of V are ordered by singular value here, so scaling them is enough to keep
            # the small ones above rounding error.
            left = [block / block.abs().amax(dim=0).clamp_min(_TINY) for block in left]
        else:
            left, smallest = one_pass(left)
            least = list(map(torch.minimum, least, smallest))
        blocks, smallest = one_pass(_each(FactoredMatrix.transposed_times, products, left))
        least = list(map(torch.minimum, least, smallest))
    return [
        Sketch(rank, block, _inner(block), gram(product.times(block)), smallest, product.energy())
        for product, rank, block, smallest in zip(products, ranks, blocks, least, strict=True)
    ]


def _start(product: FactoredMatrix, rank: int, solver: Solver) -> Tensor:
    """Return the Gaussian G that M^T multiplies."""
    width = solver.width(rank)
    if batched(product.left):
        # Modules of similar rank get sketches of equal width, which form one batch.
        width = min(16 * math.ceil(width / 16), product.shape[1], *product.left.shape)
    return gaussian(product.shape[0], width, solver.seed, product.left.device)


def _inner(block: Tensor) -> Tensor | None:
    return gram(block) if batched(block) else None


def ritz(sketches: Sequence[Sketch]) -> list[Leading]:
    """Return the leading singular vectors within the sketches' columns.

    Of V with V^T V = R^T R the columns of V R^(-1) are orthonormal (the second pass of Cholesky
    QR), and R^(-T) (M V)^T (M V) R^(-1) = Z S^2 Z^T gives the rotation Z and the values S.
    """
    inner = {i: sketch.inner for i, sketch in enumerate(sketches) if sketch.inner is not None}
    factors = zip(*inverse_factors(list(inner.values())), strict=True)
    second = dict(zip(inner, factors, strict=True))
    small, passed = [], []
    for i, sketch in enumerate(sketches):
        turned, fine = sketch.image, sketch.least > LEAST
        if i in second:
            inverse, least = second[i]
            turned, fine = inverse.T @ turned @ inverse, well_determined(sketch.least, least)
        passed.append(fine & turned.isfinite().all())
        small.append(torch.where(passed[i], turned, 0.0))
    found = []
    for i, (squares, vectors) in enumerate(eigenpairs(small)):
        sketch, rotation = sketches[i], vectors[:, : sketches[i].rank]
        rotation = second[i][0] @ rotation if i in second else rotation
        rows = fix_signs(rotation.T.to(sketch.block) @ sketch.block.T)
        found.append(Leading(rows, squares[: sketch.rank].sqrt(), passed[i], sketch.energy))
    return found


def _each(
    multiply: Callable[[FactoredMatrix, Tensor], Tensor],
    products: Sequence[FactoredMatrix],
    blocks: Sequence[Tensor],
) -> list[Tensor]:
    return [multiply(*pair) for pair in zip(products, blocks, strict=True)]
