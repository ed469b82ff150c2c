"""Many subspaces at once, as on an accelerator, against float64 and against one at a time."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlora.linalg import orthogonal
from tlora.linalg.matrices import FactoredMatrix
from tlora.linalg.singular import Solver
from tlora.linalg.subspace import Problem, Subspace, task_subspaces

READS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")
} | {torch.linalg.eigh, torch.linalg.svd}


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that were made here and are still held."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self._held = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                self._hold(each.untyped_storage())
        return found

    def _hold(self, storage):
        if (key := storage._cdata) not in self._held:
            self._held.add(key)
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key, size):
        self._held.remove(key)
        self.bytes -= size


@pytest.fixture(params=["cpu", "accelerator"])
def device_kind(request, monkeypatch):
    """The CPU's way, and that of an accelerator on the CPU."""
    if request.param == "accelerator":
        monkeypatch.setattr(orthogonal, "BATCHED", {"cpu"})
    return request.param


def matrix(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float64 matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, len(values), generator=generator).double() for n in (rows, columns)]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return left * values @ right.T


def spectrum(name: str, size: int) -> torch.Tensor:
    k = torch.arange(1, size + 1).double()
    return {
        "slow": k**-0.5,
        "power": k**-1,
        "steep": k**-2,
        "exponential": torch.exp(-k / 12),
        "outliers": k**-1 * torch.where(k <= 3, 1e4, 1.0),
    }[name]


def problem(product: torch.Tensor | FactoredMatrix, rank: int, seed: int = 9) -> Problem:
    given = product if isinstance(product, FactoredMatrix) else FactoredMatrix(product)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(given.shape, generator=generator).to(given.left)
    return Problem(lambda: given, lambda: weight, given.shape, rank)


def assert_same(one: Subspace, other: Subspace) -> None:
    assert torch.equal(one.basis, other.basis)
    assert one.captured_energy == other.captured_energy
    assert (one.method, one.determined, one.total_energy) == (
        other.method,
        other.determined,
        other.total_energy,
    )


def deviation(basis: torch.Tensor) -> float:
    gram = basis.double() @ basis.double().T
    return (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("shape", [(300, 300), (260, 700), (700, 260)])
@pytest.mark.parametrize("name", ["power", "steep", "exponential", "outliers"])
@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_the_energy_is_that_of_the_float64_svd(device_kind, mode, name, shape):
    values, rank = spectrum(name, min(shape)), 32
    product = matrix(*shape, values)
    (found,) = task_subspaces([problem(product.float(), rank)], Solver(mode=mode))
    best = values[:rank].square().sum()
    kept = (product @ found.basis.double().T).square().sum()
    assert kept / best > 1 - (1e-6 if mode == "exact" else 1e-4)
    assert found.captured_energy == pytest.approx((kept / values.square().sum()).item(), abs=1e-6)
    assert found.total_energy == pytest.approx(values.square().sum().item(), rel=1e-5)
    assert found.method == mode
    # Beside the outliers the last of them are as small as rounding errors.
    assert found.determined == rank or name == "outliers"
    assert deviation(found.basis) < 1e-5


@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_a_massive_activation_leaves_the_other_directions_as_they_are(device_kind, mode):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 500, generator=generator).double()
    x = torch.randn(2000, 500, generator=generator).double() * torch.arange(1, 501) ** -0.5
    x[0, 7], x[1, 9] = 3e3, 1e3
    product = weight @ (x.T @ x)
    rank, outliers = 32, 2
    (found,) = task_subspaces([problem(product.float(), rank)], Solver(mode=mode))
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    assert values[rank] / values[0] < 1e-4
    rest = product - (left[:, :outliers] * values[:outliers]) @ right[:outliers]
    kept = (rest @ found.basis.double().T).square().sum()
    assert kept > 0.998 * values[outliers:rank].square().sum()
    assert found.determined == rank
    assert deviation(found.basis) < 1e-5


def mixed() -> list[Problem]:
    """Modules of several shapes and ranks; some of them fail, some need no sketch."""
    made = [problem(matrix(300, 280, spectrum("power", 280), s).float(), 16) for s in range(3)]
    made += [problem(matrix(300, 280, spectrum("slow", 280), s).float(), 21) for s in (3, 4)]
    made += [problem(matrix(270, 600, spectrum("steep", 270), 5).float(), 16)]
    made += [problem(matrix(300, 280, spectrum("power", 5), 6).float(), 16)]  # of rank 5
    made += [problem(torch.zeros(300, 280), 16), problem(torch.ones(1, 30), 1)]
    made += [problem(matrix(60, 200, spectrum("power", 60), 7).float(), 8)]
    made += [problem(matrix(60, 200, spectrum("power", 3), 8).float(), 8)]  # of rank 3
    made += [problem(matrix(50, 50, spectrum("power", 50), 9), 8)]  # float64
    generator = torch.Generator().manual_seed(10)
    left, right = (torch.randn(s, generator=generator) for s in ((300, 20), (20, 280)))
    made += [problem(FactoredMatrix(left, right), 16), problem(FactoredMatrix(left, right), 24)]
    return [*made, problem(FactoredMatrix(left[:, :0], right[:0]), 16)]


@pytest.mark.parametrize("limit", [0, 2**20, 2**29])
def test_on_a_cpu_a_module_gets_the_same_bits_whatever_the_others(limit, monkeypatch):
    monkeypatch.setattr("tlora.linalg.subspace.BATCH_BYTES", limit)
    together = task_subspaces(mixed(), Solver())
    for each, found in zip(mixed(), together, strict=True):
        assert_same(task_subspaces([each], Solver())[0], found)


def test_modules_that_are_solved_together_fit_the_limit(monkeypatch):
    monkeypatch.setattr(orthogonal, "BATCHED", {"cpu"})
    monkeypatch.setattr("tlora.linalg.subspace.BATCH_BYTES", 2**23)
    given = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    modules = [Problem(lambda: FactoredMatrix(given + 1), given.clone, given.shape, 8)] * 32
    # All products take 8 MiB, and their Gram matrices and eigenvectors in float64 many times that.
    with Alive() as alive:
        task_subspaces(modules, Solver(mode="exact"))
    assert 2**21 < alive.most < 1.25 * 2**23


def test_deficient_modules_are_as_householder_has_them(monkeypatch):
    plain = task_subspaces(mixed(), Solver())
    monkeypatch.setattr(orthogonal, "BATCHED", {"cpu"})
    accelerated = task_subspaces(mixed(), Solver())
    for one, other, each in zip(accelerated, plain, mixed(), strict=True):
        assert (one.determined, one.method) == (other.determined, other.method)
        assert one.captured_energy == pytest.approx(other.captured_energy, abs=1e-3)
        assert len(one.basis) == each.rank
        assert deviation(one.basis) < 1e-5
        known = one.basis[: one.determined] @ other.basis[: other.determined].T
        if one.determined < each.rank and one.determined:
            assert known.square().sum().item() == pytest.approx(one.determined, abs=1e-3)


def test_a_failed_factorization_gives_what_householder_gives(monkeypatch):
    monkeypatch.setattr(orthogonal, "BATCHED", {"cpu"})
    each = problem(matrix(300, 280, spectrum("exponential", 280)).float(), 12)
    (expected,) = task_subspaces([each], Solver())
    real = torch.linalg.cholesky_ex

    def failing(*args, **options):
        lower, info = real(*args, **options)
        return lower.fill_(float("nan")), info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    (found,) = task_subspaces([each], Solver())
    assert found.captured_energy == pytest.approx(expected.captured_energy, abs=1e-6)
    assert (found.basis @ expected.basis.T).square().sum().item() == pytest.approx(12, abs=1e-4)


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def waits(problems: list[Problem]) -> int:
    with Waits() as counted:
        task_subspaces(problems, Solver())
    return counted.count


def test_the_host_waits_no_more_often_for_many_modules_than_for_one(monkeypatch):
    monkeypatch.setattr(orthogonal, "BATCHED", {"cpu"})
    make = partial(matrix, 300, 280, spectrum("power", 280))
    # Ranks that differ a little have sketches of equal width.
    many = [problem(make(seed).float(), 10 + seed) for seed in range(6)]
    assert waits(many) == waits(many[:1]) == 2
    small = [problem(matrix(60, 90, spectrum("power", 60), s).float(), 8) for s in range(6)]
    assert waits(small) == waits(small[:1]) == 2
