"""Leading right singular vectors of a matrix, and the choice of solver.

Solvers: exact (thin SVD) and randomized subspace iteration with oversampling (Halko, Martinsson,
Tropp 2011, algorithm 4.4); neither forms a full factor. `batched` does the same for many matrices
at once, and falls back to this file when its Cholesky factorizations fail.
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
    """How to compute singular vectors.

    Attributes:
        mode: "exact", "randomized", or "auto": randomized where it is cheaper.
        oversample: extra columns of the sketch beyond the rank; None: max(32, rank / 2).
        iterations: applications of M^T M after the initial M^T. Three keep 0.9999 of the optimal
            energy of every module of a language model; two lose up to 2e-4.
        seed: seed of the sketch, so that a plan is reproducible.
    """

    mode: str = "auto"
    oversample: int | None = None
    iterations: int = 3
    seed: int = 0

    def width(self, rank: int) -> int:
        """Columns of the sketch for ``rank`` singular vectors."""
        return rank + (max(32, rank // 2) if self.oversample is None else self.oversample)

    def method(self, product: FactoredMatrix, rank: int) -> str:
        """Return "exact" or "randomized": the method for the leading ``rank`` singular vectors.

        Raises:
            ValueError: rank is not between 1 and min(m, d).
        """
        rows, columns = product.shape
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(f"rank {rank} is not between 1 and min{(rows, columns)}")
        small = min(rows, columns if product.right is None else product.right.shape[0])
        if self.mode != "auto":
            # A sketch as wide as the matrix is the exact problem at higher cost.
            return "exact" if self.width(rank) >= small else self.mode
        return "randomized" if small >= 256 and 2 * self.width(rank) <= small else "exact"


def right_singular_vectors(
    matrix: Tensor | FactoredMatrix, rank: int, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Return the leading ``rank`` right singular vectors as rows, and their singular values.

    By Householder QR and an SVD; works for any matrix, including rank-deficient ones.

    Args:
        matrix: M, m x d, floating point; factors M = L R are not multiplied out.
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
        # Only the right factor of M V is needed: that of its triangle, without the left one.
        triangle = torch.linalg.qr(product.times(basis), mode="r").R
        _, values, vectors = torch.linalg.svd(triangle, full_matrices=False)
    vectors = vectors[:rank]
    return fix_signs(vectors if basis is None else vectors @ basis.T), values[:rank]


def _dominant(product: FactoredMatrix, width: int, solver: Solver) -> Tensor:
    """Return d x width orthonormal columns close to the leading right singular vectors of M."""
    sketch = gaussian(product.shape[0], width, solver.seed, product.left.device)
    # Starting on the left, with M^T G, saves half an iteration over starting with G.
    basis: Tensor = torch.linalg.qr(product.transposed_times(sketch.to(product.left))).Q
    for _ in range(solver.iterations):
        # Orthonormalizing on both sides keeps the small directions above rounding error.
        left = torch.linalg.qr(product.times(basis)).Q
        basis = torch.linalg.qr(product.transposed_times(left)).Q
    return basis


@functools.lru_cache(maxsize=2)
def gaussian(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Return the rows x columns float32 sketch of a seed; modules of equal shape share it."""
    # The generator lives on the CPU so that a seed gives the same sketch on every device.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(device)


def fix_signs(rows: Tensor) -> Tensor:
    """Flip each row so that its entry of largest magnitude is positive.

    A singular vector is defined up to sign; this choice is the same on every backend.
    """
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def rounding(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Return the relative threshold below which a singular value counts as rounding error.

    sqrt(max(m, d)) eps, since errors of many signs partly cancel. The worst case, max(m, d) eps, is
    1e-3 at d = 11008 in float32: a single massive activation raises the first value by more than
    that over well-determined directions.
    """
    return math.sqrt(max(shape)) * torch.finfo(dtype).eps
