"""The frozen subspace against numpy's float64 SVD."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tlora.linalg.matrices import FactoredMatrix
from tlora.linalg.singular import Solver, fix_signs, right_singular_vectors
from tlora.linalg.subspace import (
    Problem,
    Subspace,
    captured_energy,
    random_basis,
    task_subspaces,
    whitened,
)

SOLVERS = {
    "exact": Solver(mode="exact"),
    "randomized": Solver(mode="randomized", oversample=4),
}
SHAPES = [(24, 10), (10, 24), (16, 16)]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(size, size, seed)).Q


def decaying(rows: int, columns: int, power: float = 1.0, seed: int = 0) -> torch.Tensor:
    """A matrix with the singular values 1, 2^-power, 3^-power, ..."""
    small = min(rows, columns)
    values = torch.arange(1, small + 1, dtype=torch.float64) ** -power
    left, right = rotation(rows, seed)[:, :small], rotation(columns, seed + 1)[:small]
    return left @ (values[:, None] * right)


def covariance(columns: int, tokens: int | None = None, seed: int = 5) -> torch.Tensor:
    """X^T X with a decaying spectrum, of rank at most ``tokens``."""
    x = gaussian(tokens or 4 * columns, columns, seed) @ decaying(columns, columns, 0.5, seed)
    return x.T @ x


def top_rows(matrix: torch.Tensor, rank: int) -> np.ndarray:
    return np.linalg.svd(matrix.double().numpy())[2][:rank]


def overlap(basis: torch.Tensor, rows: np.ndarray) -> float:
    """Mean squared cosine between two subspaces given by orthonormal rows."""
    return float(np.square(basis.double().numpy() @ rows.T).sum() / len(rows))


def subspace_of_product(
    weight: torch.Tensor, product: FactoredMatrix, rank: int, solver: Solver
) -> Subspace:
    problem = Problem(lambda: product, lambda: weight, product.shape, rank)
    return task_subspaces([problem], solver)[0]


def task_subspace(
    weight: torch.Tensor, moment: torch.Tensor, rank: int, solver: Solver
) -> Subspace:
    return subspace_of_product(weight, FactoredMatrix(weight @ moment.to(weight)), rank, solver)


def assert_orthonormal(basis: torch.Tensor, tolerance: float = 1e-5) -> None:
    gram = basis.double() @ basis.double().T
    assert (gram - torch.eye(len(basis), dtype=torch.float64)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_rows_are_those_of_the_float64_svd(shape: tuple[int, int], dtype: Any) -> None:
    weight, moment = gaussian(*shape), covariance(shape[1])
    for rank in (1, 4, min(shape)):
        found = task_subspace(weight.to(dtype), moment.to(dtype), rank, SOLVERS["exact"])
        cosines = found.basis.double().numpy() * top_rows(weight @ moment, rank)
        np.testing.assert_allclose(np.abs(cosines.sum(axis=1)), 1, atol=1e-3)
        assert_orthonormal(found.basis)
        assert found.basis.shape == (rank, shape[1])
        assert found.basis.dtype == torch.float32
        assert (found.method, found.determined) == ("exact", rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_float64_svd(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape)
    for solver in SOLVERS.values():
        _, values = right_singular_vectors(matrix, 3, solver)
        np.testing.assert_allclose(values, [1, 1 / 2, 1 / 3], rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_product_is_weight_times_covariance(solver: Solver) -> None:
    weight, moment, rank = gaussian(16, 16), covariance(16), 4
    basis = task_subspace(weight, moment, rank, solver).basis
    assert overlap(basis, top_rows(weight @ moment, rank)) > 0.999
    for wrong in (moment @ weight, weight.T @ moment, (weight @ moment).T, weight, moment):
        assert overlap(basis, top_rows(wrong, rank)) < 0.95


def test_a_two_by_two_case_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    # W C = [[0, 2], [1, 0]] prefers the second input; C W = [[0, 1], [2, 0]] the first.
    found = task_subspace(weight, torch.diag(torch.tensor([1.0, 2.0])), 1, SOLVERS["exact"])
    torch.testing.assert_close(found.basis, torch.tensor([[0.0, 1.0]]))
    assert found.captured_energy == pytest.approx(4 / 5)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_signs_do_not_depend_on_the_solver_s_choice(solver: Solver) -> None:
    # Q W C has the right singular vectors of W C for every orthogonal Q, also Q = -1.
    solver = replace(solver, iterations=6)
    weight, moment = gaussian(16, 16), covariance(16)
    reference = task_subspace(weight, moment, 5, solver).basis
    largest = reference.gather(1, reference.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    for left in (-torch.eye(16, dtype=torch.float64), rotation(16, 3), rotation(16, 4)):
        again = task_subspace(left @ weight, moment, 5, solver).basis
        torch.testing.assert_close(again, reference, atol=1e-4, rtol=0)


def test_fix_signs_only_flips_rows() -> None:
    rows = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.1, -0.2], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[-1.0, 3.0, -2.0], [0.5, 0.1, -0.2], [0.0, 0.0, 0.0]])
    assert torch.equal(fix_signs(rows), expected)


@pytest.mark.parametrize("shape", [(300, 280), (280, 300), (512, 256)])
def test_randomized_is_near_the_optimum_on_a_decaying_spectrum(shape: tuple[int, int]) -> None:
    weight, rank = decaying(*shape).float(), 16
    moment = torch.eye(shape[1])
    found = task_subspace(weight, moment, rank, Solver(mode="randomized"))
    energies = np.square(np.linalg.svd(weight.double().numpy(), compute_uv=False))
    assert found.method == "randomized"
    assert_orthonormal(found.basis)
    assert overlap(found.basis, top_rows(weight, rank)) > 0.999
    optimum = energies[:rank].sum() / energies.sum()
    assert optimum * (1 - 1e-4) < found.captured_energy < optimum * (1 + 1e-5)


def test_a_seed_decides_the_bits_and_the_global_generator_is_left_alone() -> None:
    weight, moment = gaussian(64, 48).float(), covariance(48).float()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    solver = Solver(mode="randomized", oversample=4, seed=7)
    first = task_subspace(weight, moment, 6, solver).basis
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(task_subspace(weight, moment, 6, solver).basis, first)
    other = Solver(mode="randomized", oversample=4, seed=8)
    assert not torch.equal(task_subspace(weight, moment, 6, other).basis, first)


@pytest.mark.parametrize("mode", ["exact", "randomized", "auto"])
def test_the_method_named_is_the_method_used(mode: str) -> None:
    small = task_subspace(gaussian(20, 30), covariance(30), 4, Solver(mode=mode))
    assert small.method == "exact"  # 36 sketch columns are more than the matrix has.
    large = task_subspace(decaying(260, 300), torch.eye(300), 4, Solver(mode=mode))
    assert large.method == {"exact": "exact"}.get(mode, "randomized")
    assert overlap(large.basis, top_rows(decaying(260, 300), 4)) > 0.999


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_captured_energy_is_the_share_kept_by_the_basis(
    solver: Solver, shape: tuple[int, int]
) -> None:
    weight, moment = gaussian(*shape), covariance(shape[1])
    found = task_subspace(weight, moment, 4, solver)
    product, basis = (weight @ moment).numpy(), found.basis.double().numpy()
    expected = np.square(product @ basis.T).sum() / np.square(product).sum()
    assert 0.1 < expected < 0.999
    assert found.captured_energy == pytest.approx(expected, abs=1e-4)
    assert captured_energy(FactoredMatrix(weight @ moment), found.basis) == pytest.approx(
        expected, abs=1e-6
    )


def test_captured_energy_of_rows_that_are_not_orthonormal_is_that_of_their_span() -> None:
    product, rows = gaussian(8, 6), gaussian(3, 6, seed=1)
    projector = np.linalg.pinv(rows.numpy()) @ rows.numpy()
    expected = np.square(product.numpy() @ projector).sum() / np.square(product.numpy()).sum()
    assert captured_energy(FactoredMatrix(product), rows) == pytest.approx(expected)
    assert captured_energy(FactoredMatrix(product), torch.eye(6)) == pytest.approx(1.0)
    assert captured_energy(FactoredMatrix(torch.zeros(8, 6)), rows) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_fewer_tokens_than_rank_are_completed_by_the_weight(
    solver: Solver, shape: tuple[int, int]
) -> None:
    weight, moment, tokens, rank = gaussian(*shape), covariance(shape[1], tokens=3), 3, 6
    found = task_subspace(weight, moment, rank, solver)
    assert found.determined == tokens
    assert found.captured_energy == pytest.approx(1.0)
    assert_orthonormal(found.basis)
    assert torch.equal(found.basis, fix_signs(found.basis))
    known = top_rows(weight @ moment, tokens)
    assert overlap(found.basis[:tokens], known) > 0.9999
    outside = torch.from_numpy(weight.numpy() @ (np.eye(shape[1]) - known.T @ known))
    assert overlap(found.basis[tokens:], top_rows(outside, rank - tokens)) > 0.95
    if solver.mode == "exact":
        assert overlap(found.basis[tokens:], top_rows(outside, rank - tokens)) > 0.99999


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_covariance_leaves_the_directions_of_the_weight(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = gaussian(*shape).to(dtype)
    zero = torch.zeros(shape[1], shape[1])
    found = task_subspace(weight, zero, 4, SOLVERS["exact"])
    assert (found.determined, found.captured_energy) == (0, 1.0)
    assert_orthonormal(found.basis)
    assert overlap(found.basis, top_rows(weight, 4)) > 0.99999


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_weight_of_too_low_rank_still_gives_orthonormal_rows(
    solver: Solver, shape: tuple[int, int]
) -> None:
    for rank_of_weight in (0, 2):
        weight = gaussian(shape[0], rank_of_weight) @ gaussian(rank_of_weight, shape[1])
        moment = covariance(shape[1])
        found = task_subspace(weight, moment, 5, solver)
        assert found.determined == rank_of_weight
        assert found.captured_energy == pytest.approx(1.0)
        assert found.basis.shape == (5, shape[1])
        assert_orthonormal(found.basis)
        if rank_of_weight:
            known = top_rows(weight @ moment, rank_of_weight)
            assert overlap(found.basis[:rank_of_weight], known) > 0.9999


@pytest.mark.parametrize("rank", [-1, 0, 11])
def test_a_rank_outside_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not between 1 and min\(24, 10\)"):
        right_singular_vectors(gaussian(24, 10), rank, SOLVERS["exact"])


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_no_solver_asks_for_full_factors(
    solver: Solver, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def guard(name: str, is_thin: Any) -> None:
        original = getattr(torch.linalg, name)

        def checked(*args: Any, **options: Any) -> Any:
            calls.append(name)
            assert is_thin(args, options), f"{name} was asked for full factors"
            return original(*args, **options)

        monkeypatch.setattr(torch.linalg, name, checked)

    guard("svd", lambda args, options: (*args[1:], options.get("full_matrices", True))[0] is False)
    guard("qr", lambda args, options: (*args[1:], options.get("mode", "reduced"))[0] != "complete")
    for shape in SHAPES:
        task_subspace(gaussian(*shape), covariance(shape[1], tokens), 5, solver)
    assert "svd" in calls


def test_random_basis_is_lora_s_uniform_initialization() -> None:
    state = torch.get_rng_state()
    basis = random_basis(64, 400, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (basis.shape, basis.dtype) == ((64, 400), torch.float32)
    assert 0.99 / 20 < basis.max() <= 1 / 20
    assert -1 / 20 <= basis.min() < -0.99 / 20
    assert basis.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert torch.equal(basis, random_basis(64, 400, seed=3))
    assert not torch.equal(basis, random_basis(64, 400, seed=4))


def feature_moment(rows: torch.Tensor, uncentered: torch.Tensor) -> np.ndarray:
    return rows.double().numpy() @ uncentered.double().numpy() @ rows.double().numpy().T


@pytest.mark.parametrize("power", [-0.5, -0.25])
def test_whitening_is_a_power_of_k_scaled_to_unit_rows(power: float) -> None:
    basis, moment = rotation(12)[:5], covariance(12)
    values, vectors = np.linalg.eigh(feature_moment(basis, moment))
    expected = vectors @ np.diag(values**power) @ vectors.T @ basis.numpy()
    expected *= math.sqrt(5) / np.linalg.norm(expected)
    np.testing.assert_allclose(whitened(basis, moment, power), expected, atol=1e-5)


@pytest.mark.parametrize("power", [-0.5, -0.25])
@pytest.mark.parametrize("tokens", [2, 100])
def test_whitening_keeps_the_mean_squared_row_norm_at_one(tokens: int, power: float) -> None:
    rows = whitened(rotation(12)[:5], covariance(12, tokens), power).double()
    assert rows.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=1e-5)


def test_tiny_eigenvalues_are_clamped_at_a_millionth_of_the_largest() -> None:
    basis = torch.eye(4)
    moment = torch.diag(torch.tensor([9.0, 9e-6, 9e-9, 0.0]))
    norms = whitened(basis, moment).norm(dim=1).double()
    np.testing.assert_allclose(norms / norms[0], [1, 1e3, 1e3, 1e3], rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_whitening_does_not_depend_on_the_scale_of_the_inputs(scale: float) -> None:
    basis = rotation(12)[:5]
    moment = torch.eye(12, dtype=torch.float64) * scale
    torch.testing.assert_close(whitened(basis, moment), basis.float())


# --- W C in factors


def factors(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> tuple[Any, FactoredMatrix]:
    """W and the factors of W X^T X."""
    weight = gaussian(rows, columns).to(dtype)
    x = (gaussian(tokens, columns, 5) @ decaying(columns, columns, 0.5, 5)).to(dtype)
    return weight, FactoredMatrix(weight @ x.T, x)


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_act_as_their_product(shape: tuple[int, int], tokens: int) -> None:
    _, product = factors(*shape, tokens, torch.float64)
    matrix = product.dense()
    assert product.shape == shape == tuple(matrix.shape)
    right, left = gaussian(shape[1], 3), gaussian(shape[0], 3)
    torch.testing.assert_close(product.times(right), matrix @ right)
    torch.testing.assert_close(product.transposed_times(left), matrix.T @ left)
    torch.testing.assert_close(product.energy(), matrix.square().sum())
    narrow, basis = product.reduced()
    whole = narrow if basis is None else narrow @ basis.T
    torch.testing.assert_close(whole, matrix)
    assert narrow.shape[1] == min(tokens, shape[1])


@pytest.mark.parametrize("tokens", [0, 3, 9, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_factors_give_the_subspace_of_their_product(
    solver: Solver, shape: tuple[int, int], tokens: int
) -> None:
    weight, product = factors(*shape, tokens, torch.float64)
    rank = 4
    whole = subspace_of_product(weight, FactoredMatrix(product.dense()), rank, Solver(mode="exact"))
    found = subspace_of_product(weight, product, rank, solver)
    assert found.determined == whole.determined == min(rank, tokens)
    assert found.captured_energy == pytest.approx(whole.captured_energy, rel=1e-3)
    assert_orthonormal(found.basis)
    # The directions of W that complete a basis are as good as the solver is on W.
    exact = solver.mode == "exact"
    rows = slice(rank if exact else found.determined)
    if found.determined or exact:
        shared = overlap(found.basis[rows], whole.basis[rows].double().numpy())
        assert shared > (1 - 1e-5 if exact else 0.95)


def test_three_iterations_keep_999_in_1000_of_the_best_also_where_the_spectrum_is_flat() -> None:
    # Singular values as k^-0.5: the sixteen largest of 300 hold half of the energy.
    matrix = decaying(300, 300, 0.5).float()
    best = np.square(np.linalg.svd(matrix.double().numpy(), compute_uv=False))[:16].sum()
    vectors, _ = right_singular_vectors(matrix, 16, Solver(mode="randomized"))
    assert float((matrix @ vectors.T).square().sum()) > 0.999 * best
    hasty, _ = right_singular_vectors(matrix, 16, Solver(mode="randomized", iterations=0))
    assert float((matrix @ hasty.T).square().sum()) < 0.99 * best


@pytest.mark.parametrize("mode", ["exact", "randomized"])
def test_one_token_of_massive_activation_hides_no_direction(mode: str) -> None:
    rank, weight = 16, gaussian(300, 600) / 600**0.5
    x = gaussian(2000, 600, seed=1) * torch.arange(1, 601) ** -0.5
    x[0, 7] = 1500.0
    moment = x.T @ x / len(x)
    found = task_subspace(weight.float(), moment.float(), rank, Solver(mode=mode))
    assert found.determined == rank
    values = np.linalg.svd((weight.double() @ moment.double()).numpy(), compute_uv=False)
    assert values[rank - 1] / values[0] < 600 * torch.finfo(torch.float32).eps
    exact = top_rows(weight.double() @ moment.double(), rank)
    assert overlap(found.basis, exact) > 0.99
