"""The frozen subspace: leading right singular vectors of W C, and their captured energy.

Source: arXiv 2604.18124, section 3 (A = V_r of W C; B = 0). The released code computes full U and
V; no solver here forms a full factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.linalg.batched import Leading, Sketch, exact, ritz, sketched, solvable
from tlora.linalg.matrices import FactoredMatrix
from tlora.linalg.orthogonal import BATCH_BYTES, batches, read
from tlora.linalg.singular import Solver, fix_signs, right_singular_vectors, rounding


@dataclass(frozen=True)
class Subspace:
    """A basis of the task subspace of one module.

    Attributes:
        basis: r x d float32, orthonormal rows, strongest direction first.
        captured_energy: ||W C basis^T||_F^2 / ||W C||_F^2, in [0, 1]; 1.0 if W C is zero, None if
            not measured.
        method: the solver: "exact", "randomized", "streamed", "random" or "none".
        determined: number of rows that W C itself determines; the others (fewer tokens than rank,
            or a rank-deficient weight) are leading directions of W.
        total_energy: ||W C||_F^2.
    """

    basis: Tensor
    captured_energy: float | None
    method: str
    determined: int
    total_energy: float | None = 0.0


def captured_energy(product: FactoredMatrix, basis: Tensor) -> float:
    """Return ||M Q||_F^2 / ||M||_F^2 for the row space of ``basis``; 1.0 if M is zero.

    Return ||M Q||_F^2 / ||M||_F^2 for the row space of ``basis``; 1.0 if M is zero.
        product: M = W C, m x d.
        basis: k x d; its rows need not be orthonormal.
    """
    return share(*energies(product, basis).tolist())


def energies(product: FactoredMatrix, basis: Tensor) -> Tensor:
    """Return ||M Q||_F^2 and ||M||_F^2 (`captured_energy`), float64 on the device of M."""
    columns = torch.linalg.qr(basis.T.to(product.left)).Q
    kept = FactoredMatrix(product.times(columns)).energy()
    return torch.stack([kept, product.energy()])


@dataclass(frozen=True)
class Problem:
    """A module to compute the task subspace of.

    Attributes:
        product: returns W C, formed or in factors (`SecondMoment.weighted`); or any matrix with d
            columns and at least ``rank`` rows, which then replaces W C in the result (`bases`).
        weight: returns W, m x d, float32 or float64; called if W C leaves the basis incomplete.
        shape: of the product.
        rank: r, at most min(m, d).
        columns: Q, where the product is M Q and M = (M Q) Q^T: orthonormal columns, d x l. None if
            the product is M.
    """

    product: Callable[[], FactoredMatrix]
    weight: Callable[[], Tensor]
    shape: tuple[int, int]
    rank: int
    columns: Tensor | None = None


def task_subspaces(problems: Sequence[Problem], solver: Solver) -> list[Subspace]:
    """Return the leading right singular vectors of each module's W C, or of another matrix.

    If W C has fewer than ``rank`` nonzero singular values, the remaining rows are the leading right
    singular vectors of W outside that span. (The released code keeps whatever its SVD returns
    there.)

    Synchronizes once for all modules. A module whose Cholesky factorizations fail (W C of too low a
    rank) is then solved separately. On a CPU, the bits of a module do not depend on the others.

    Args:
        problems: the modules, solved in batches of at most `BATCH_BYTES`, or one at a time.
        solver: how to compute the singular vectors.

    Raises:
        ValueError: a rank is not between 1 and min(m, d).
    """
    found: dict[int, Leading | Sketch | Subspace] = {}
    sizes = [_solving_bytes(problem, solver) for problem in problems]
    for places in batches(sizes, BATCH_BYTES):
        found |= _start({place: problems[place] for place in places}, solver)
    sketches = {place: each for place, each in found.items() if isinstance(each, Sketch)}
    found |= dict(zip(sketches, ritz(list(sketches.values())), strict=True))
    quick = {place: each for place, each in found.items() if isinstance(each, Leading)}
    measured = read([_measured(each, problems[place].shape) for place, each in quick.items()])
    for (place, each), (passed, determined, kept, whole) in zip(
        quick.items(), measured, strict=True
    ):
        problem, method = problems[place], "randomized" if place in sketches else "exact"
        if passed:
            vectors = completed(each.vectors[: int(determined)], problem, solver)
            energy = share(kept, whole)
            found[place] = Subspace(vectors, energy, method, int(determined), whole)
        else:
            found[place] = _solve_one(problem.product(), problem, solver)
    return [found[place] for place in range(len(problems))]  # type: ignore[misc]


def _solving_bytes(problem: Problem, solver: Solver) -> int:
    """Return the bytes to solve a formed W C; the exact solver uses five float64 Gram matrices.

    These are the Gram matrix, a batch copy, a symmetrized copy, and its eigenvectors.
    """
    formed = FactoredMatrix(torch.empty(problem.shape, device="meta"))
    grams = 5 if solver.method(formed, problem.rank) == "exact" else 0
    return 4 * math.prod(problem.shape) + 8 * grams * min(problem.shape) ** 2


def _start(
    problems: Mapping[int, Problem], solver: Solver
) -> dict[int, Leading | Sketch | Subspace]:
    """Do the work that needs the matrices, without synchronizing."""
    products = {place: problem.product() for place, problem in problems.items()}
    ways: dict[str, list[int]] = {"exact": [], "randomized": [], "alone": []}
    for place, product in products.items():
        method = solver.method(product, problems[place].rank)
        ways[method if solvable(product, method) else "alone"].append(place)
    alone = {place: _solve_one(products[place], problems[place], solver) for place in ways["alone"]}
    few = ways["exact"]
    small = exact([products[place] for place in few], [problems[place].rank for place in few])
    many = ways["randomized"]
    large = sketched(
        [products[place] for place in many], [problems[place].rank for place in many], solver
    )
    return alone | dict(zip(few, small, strict=True)) | dict(zip(many, large, strict=True))


def _measured(found: Leading, shape: Sequence[int]) -> Tensor:
    """Return four float64 numbers: passed or not, directions determined, energy kept, total."""
    smallest = rounding(shape, torch.float32) * found.values[:1]
    determined = (found.values > smallest).sum()
    numbers = found.passed, determined, found.values.square().sum(), found.energy
    return torch.stack([number.double() for number in numbers])


def _solve_one(product: FactoredMatrix, problem: Problem, solver: Solver) -> Subspace:
    """Solve one module by Householder QR and SVD."""
    vectors, values = right_singular_vectors(product, problem.rank, solver)
    nonzero = (values > rounding(product.shape, values.dtype) * values[:1]).sum()
    kept, total = values.double().square().sum(), product.energy()
    # One transfer for all three, since each one synchronizes with an accelerator.
    determined, energy, whole = torch.stack([nonzero.double(), kept, total]).tolist()
    vectors = completed(vectors[: int(determined)], problem, solver)
    method = solver.method(product, problem.rank)
    return Subspace(vectors.float(), share(energy, whole), method, int(determined), whole)


def share(kept: float, whole: float) -> float:
    """Return the captured energy kept / whole, or 1.0 if the whole is zero."""
    return 1.0 if whole == 0 else min(1.0, kept / whole)


def completed(found: Tensor, problem: Problem, solver: Solver) -> Tensor:
    """Extend the orthonormal rows ``found`` to the rank with leading directions of the weight."""
    if problem.columns is not None:
        found = fix_signs(found @ problem.columns.T)
    if len(found) == problem.rank:
        return found
    weight = problem.weight()
    rest = weight - (weight @ found.T) @ found
    extra, _ = right_singular_vectors(rest, problem.rank - len(found), solver)
    # A zero direction of `rest` may point back into `found`: QR keeps the leading rows (up to sign)
    # and makes the others orthogonal to them.
    return fix_signs(torch.linalg.qr(torch.cat([found, extra]).T).Q.T)


def random_basis(rank: int, columns: int, seed: int) -> Tensor:
    """Return LoRA's own initial A, r x d float32: uniform in +-1/sqrt(d) (Kaiming, a = sqrt 5).

    This is the paper's ablation without initialization; the rows are not orthonormal.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def whitened(basis: Tensor, uncentered: Tensor, power: float = -0.5) -> Tensor:
    """Return A' = c K^power A, so that the features A' x have equal variance (power -1/2).

    K = A C0 A^T, r x r. Its eigenvalues are clamped at 1e-6 of the largest, and c makes the mean
    squared row norm of A' one, which is that of an orthonormal A. Source: docs/method.md, 7: the
    paper's own C^(-1/2), restricted to the r leading directions, so it never inverts tiny
    eigenvalues.

    Args:
        basis: A, r x d.
        uncentered: C0, d x d: the uncentered second moment of the inputs.
        power: -1/2 whitens fully; -1/4 leaves the square roots of the original variances.
    """
    kernel = basis.double() @ uncentered.double() @ basis.double().T
    values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
    # Relative to the largest eigenvalue, so that K = 0 (a module that saw no token) returns A
    # itself.
    relative = values / values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    root = vectors * relative.clamp_min(1e-6).pow(power) @ vectors.T
    rows: Tensor = root @ basis.double()
    return (rows / rows.square().sum(dim=1).mean().sqrt()).float()
