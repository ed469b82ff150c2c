"""The frozen subspace: leading right singular vectors of W C, and how well they do.

Source: arXiv 2604.18124, section 3 (A = V_r of W C; B = 0). The released code asks for full U and
V; here neither solver forms a full factor. Solvers: exact (thin SVD) and randomized subspace
iteration with oversampling (Halko, Martinsson, Tropp 2011, algorithm 4.4).
"""

from __future__ import annotations

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
        mode: "exact", "randomized", or "auto": randomized where that is several times cheaper.
        oversample: extra columns of the sketch beyond the rank; None: max(32, rank / 2).
        iterations: of M^T M, beyond the M^T that the sketch starts with. Two keep 0.9999 of the
            optimal energy on real activations, 0.9997 where the spectrum is flat.
        seed: of the sketch, so that a plan is reproducible.
    """

    mode: str = "auto"
    oversample: int | None = None
    iterations: int = 2
    seed: int = 0

    def width(self, rank: int) -> int:
        """Columns of the sketch for ``rank`` singular vectors."""
        return rank + (max(32, rank // 2) if self.oversample is None else self.oversample)

    def resolve(self, rows: int, columns: int, rank: int) -> str:
        """Return "exact" or "randomized" for the leading ``rank`` of a rows x columns matrix."""
        small = min(rows, columns)
        if self.mode != "auto":
            # A sketch as wide as the matrix is the exact problem, solved with more work.
            return "exact" if self.width(rank) >= small else self.mode
        return "randomized" if small >= 256 and 3 * self.width(rank) <= small else "exact"


@dataclass(frozen=True)
class Subspace:
    """A basis of the task subspace of one module.

    Attributes:
        basis: r x d float32, orthonormal rows, the strongest direction first.
        captured_energy: ||W C basis^T||_F^2 / ||W C||_F^2, in [0, 1]; 1.0 where W C is zero, None
            where it was not measured.
        method: how it was found: "exact", "randomized", "streamed", "random" or "none".
        determined: how many rows W C itself determines; the others (fewer tokens than rank, or a
            rank-deficient weight) complete it with leading directions of W.
        total_energy: ||W C||_F^2.
    """

    basis: Tensor
    captured_energy: float | None
    method: str
    determined: int
    total_energy: float | None = 0.0


def right_singular_vectors(
    matrix: Tensor | FactoredMatrix, rank: int, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Return the leading ``rank`` right singular vectors as rows, and their singular values.

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
    rows, columns = product.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} is not between 1 and min{(rows, columns)}")
    if solver.resolve(rows, columns, rank) == "exact":
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
    # The generator lives on the CPU so that a seed means the same sketch on every device.
    generator = torch.Generator().manual_seed(solver.seed)
    sketch = torch.randn(product.shape[0], width, generator=generator, dtype=torch.float32)
    # Starting on the left, with M^T G, is half an iteration ahead of starting with G.
    basis: Tensor = torch.linalg.qr(product.transposed_times(sketch.to(product.left))).Q
    for _ in range(solver.iterations):
        # Orthonormalizing on both sides keeps the small directions above rounding error.
        left = torch.linalg.qr(product.times(basis)).Q
        basis = torch.linalg.qr(product.transposed_times(left)).Q
    return basis


def fix_signs(rows: Tensor) -> Tensor:
    """Flip each row so that its entry of largest magnitude is positive.

    A singular vector is defined up to sign; this choice makes it the same on every backend.
    """
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def captured_energy(product: FactoredMatrix, basis: Tensor) -> float:
    """Return ||M Q||_F^2 / ||M||_F^2 for the row space of ``basis``; 1.0 if M is zero.

    Args:
        product: M = W C, m x d.
        basis: k x d; its rows need not be orthonormal.
    """
    columns = torch.linalg.qr(basis.T.to(product.left)).Q
    kept = FactoredMatrix(product.times(columns)).energy()
    energy, whole = torch.stack([kept, product.energy()]).tolist()
    return 1.0 if whole == 0 else min(1.0, energy / whole)


def task_subspace(weight: Tensor, product: FactoredMatrix, rank: int, solver: Solver) -> Subspace:
    """Return the leading ``rank`` right singular vectors of W C, or of another matrix.

    Where W C has fewer than ``rank`` nonzero singular values, the rest of the basis are the
    leading right singular vectors of W outside the span found. (The released code takes whatever
    its SVD returns there.)

    Args:
        weight: W, m x d, float32 or float64.
        product: W C, formed or in factors (`SecondMoment.weighted`); or any matrix of d columns and
            ``rank`` rows or more, which then stands for W C in the result (`bases`).
        rank: r, at most min(m, d).
        solver: how the singular vectors are found.
    """
    vectors, values = right_singular_vectors(product, rank, solver)
    nonzero = (values > rounding(product.shape, values.dtype) * values[:1]).sum()
    kept, total = values.double().square().sum(), product.energy()
    # One transfer for all three, since on an accelerator each waits for it.
    determined, energy, whole = torch.stack([nonzero.double(), kept, total]).tolist()
    vectors = completed(vectors[: int(determined)], weight, rank, solver)
    share = 1.0 if whole == 0 else min(1.0, energy / whole)
    method = solver.resolve(*product.shape, rank)
    return Subspace(vectors.float(), share, method, int(determined), whole)


def rounding(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Return the share of the largest singular value below which one is taken for rounding error.

    sqrt(max(m, d)) eps, as errors of many signs add up. The worst case, max(m, d) eps, is 1e-3 at
    d = 11008 in float32: one token of massive activation lifts the first value by more than that
    over directions that are well determined.
    """
    return math.sqrt(max(shape)) * torch.finfo(dtype).eps


def completed(found: Tensor, weight: Tensor, rank: int, solver: Solver) -> Tensor:
    """Extend orthonormal rows ``found`` to ``rank`` rows by leading directions of ``weight``."""
    if len(found) == rank:
        return found
    rest = weight - (weight @ found.T) @ found
    extra, _ = right_singular_vectors(rest, rank - len(found), solver)
    # A zero direction of `rest` may point back into `found`: QR keeps the leading rows as they
    # are (up to sign) and makes the others orthogonal to them.
    return fix_signs(torch.linalg.qr(torch.cat([found, extra]).T).Q.T)


def random_basis(rank: int, columns: int, seed: int) -> Tensor:
    """Return LoRA's own initial A, r x d float32: uniform in +-1/sqrt(d) (Kaiming, a = sqrt 5).

    The paper's ablation without initialization; the rows are not orthonormal.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def whitened(basis: Tensor, uncentered: Tensor, power: float = -0.5) -> Tensor:
    """Return A' = c K^power A, so that the features A' x have equal variance (power -1/2).

    K = A C0 A^T, r x r. Its eigenvalues are clamped at 1e-6 of the largest, and c makes the mean
    squared row norm of A' one, which is that of an orthonormal A. Source: docs/method.md, 7: the
    paper's own C^(-1/2), taken inside the r leading directions, where it inverts nothing tiny.

    Args:
        basis: A, r x d.
        uncentered: C0, d x d: the uncentered second moment of the inputs.
        power: -1/2 whitens fully; with -1/4 the variances are the square roots of what they were.
    """
    kernel = basis.double() @ uncentered.double() @ basis.double().T
    values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
    # Relative to the largest, so that K = 0 (a module that saw no token) gives A itself.
    relative = values / values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    root = vectors * relative.clamp_min(1e-6).pow(power) @ vectors.T
    rows: Tensor = root @ basis.double()
    return (rows / rows.square().sum(dim=1).mean().sqrt()).float()
