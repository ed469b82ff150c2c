"""Leading right singular vectors of a matrix, and how they are to be found.

Solvers: exact (thin SVD) and randomized subspace iteration with oversampling (Halko, Martinsson,
Tropp 2011, algorithm 4.4); neither forms a full factor. `batched` does the same for many matrices
at once, and leaves to this file what its Cholesky factorizations cannot do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.linalg.matrices import FactoredMatrix


@dataclass(frozen=True)
class Solver:
    """How singular vectors are found.

    Attributes:
        mode: "exact", "randomized", or "auto": randomized where that is cheaper.
        oversample: extra columns of the sketch beyond the rank; None: max(32, rank / 2).
        iterations: of M^T M, beyond the M^T that the sketch starts with. Three keep 0.9999 of the
            optimal energy of every module of a language model; two lose 2e-4 in the worst.
        seed: of the sketch, so that a plan is reproducible.
    """

    mode: str = "auto"
    oversample: int | None = None
    iterations: int = 3
    seed: int = 0

    def width(self, rank: int) -> int:
        """Columns of the sketch for ``rank`` singular vectors."""
        return rank + (max(32, rank // 2) if self.oversample is None else self.oversample)

    def method(self, product: FactoredMatrix, rank: int) -> str:
        """Return "exact" or "randomized": the way to the leading ``rank`` singular vectors.

        Raises:
            ValueError: rank is not between 1 and min(m, d).
        """
        rows, columns = product.shape
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(f"rank {rank} is not between 1 and min{(rows, columns)}")
        small = min(rows, columns if product.right is None else product.right.shape[0])
        if self.mode != "auto":
            # A sketch as wide as the matrix is the exact problem, solved with more work.
            return "exact" if self.width(rank) >= small else self.mode
        return "randomized" if small >= 256 and 2 * self.width(rank) <= small else "exact"


def right_singular_vectors(
    matrix: Tensor | FactoredMatrix, rank: int, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Return the leading ``rank`` right singular vectors as rows, and their singular values.

    By Householder's QR and an SVD: of any matrix, also of one that is not of full rank.

    Args:
        matrix: M, m x d, floating point; factors M = L R are used as they are.
        rank: r, at most min(m, d).
        solver: exact thin SVD, or randomized: V <- orth(M^T G) with Gaussian G, V <- orth(M^T M V)
            repeated, then Rayleigh-Ritz.

    Returns:
        V^T (r x d, orthonormal rows, each with its entry of largest magnitude positive) and the
        singular values (r, descending), in the dtype of ``matrix``. Fewer than r where M is a
        product over fewer inner columns.

    Raises:
        ValueError: rank is not between 1 and min(m, d).
    """
    product = matrix if isinstance(matrix, FactoredMatrix) else FactoredMatrix(matrix)
    if solver.method(product, rank) == "exact":
        narrow, basis = product.reduced()
        _, values, vectors = torch.linalg.svd(narrow, full_matrices=False)
    else:
        basis = _dominant(product, solver.width(rank), solver)
        # Of M V only the right factor is wanted: that of its triangle, without the left one.
        triangle = torch.linalg.qr(product.times(basis), mode="r").R
        _, values, vectors = torch.linalg.svd(triangle, full_matrices=False)
    vectors = vectors[:rank]
    return fix_signs(vectors if basis is None else vectors @ basis.T), values[:rank]


def _dominant(product: FactoredMatrix, width: int, solver: Solver) -> Tensor:
    """Return d x width orthonormal columns close to the leading right singular vectors of M."""
    sketch = gaussian(product.shape[0], width, solver.seed, product.left.device)
    # Starting on the left, with M^T G, is half an iteration ahead of starting with G.
    basis: Tensor = torch.linalg.qr(product.transposed_times(sketch.to(product.left))).Q
    for _ in range(solver.iterations):
        # Orthonormalizing on both sides keeps the small directions above rounding error.
        left = torch.linalg.qr(product.times(basis)).Q
        basis = torch.linalg.qr(product.transposed_times(left)).Q
    return basis


@functools.lru_cache(maxsize=2)
def gaussian(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Return the rows x columns float32 sketch of a seed; modules of equal shape share it."""
    # The generator lives on the CPU so that a seed means the same sketch on every device.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(device)


def fix_signs(rows: Tensor) -> Tensor:
    """Flip each row so that its entry of largest magnitude is positive.

    A singular vector is defined up to sign; this choice makes it the same on every backend.
    """
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def rounding(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Return the share of the largest singular value below which one is taken for rounding error.

    sqrt(max(m, d)) eps, as errors of many signs add up. The worst case, max(m, d) eps, is 1e-3 at
    d = 11008 in float32: one token of massive activation lifts the first value by more than that
    over directions that are well determined.
    """
    return math.sqrt(max(shape)) * torch.finfo(dtype).eps
