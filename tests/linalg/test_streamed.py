"""Subspace iteration over samples against the exact subspace of W C."""

from __future__ import annotations

import pytest
import torch

from tlora.linalg.matrices import FactoredMatrix
from tlora.linalg.singular import Solver
from tlora.linalg.streamed import StreamedSubspace, advance, results
from tlora.linalg.subspace import Problem, Subspace, task_subspaces


def activations(tokens: int, columns: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    """Rows whose spectrum falls like 1 / k^decay, in a random basis, a few samples apart."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    spectrum = torch.arange(1, columns + 1).float().pow(-decay)
    return torch.randn(tokens, columns, generator=generator) * spectrum @ turn


def stream(x: torch.Tensor, weight: torch.Tensor, rank: int, seed: int = 0):
    space = StreamedSubspace(x.shape[1], rank, seed)
    made = 0
    while not space.finished:
        for sample in x.split(50):
            space.add(sample)
        advance([space], [lambda: weight])
        made += 1
    assert made == 3
    return results([space], [lambda: weight])[0]


def exact_subspace(weight: torch.Tensor, x: torch.Tensor, rank: int) -> Subspace:
    product = FactoredMatrix(weight @ (x.T @ x))
    problem = Problem(lambda: product, lambda: weight, product.shape, rank)
    return task_subspaces([problem], Solver(mode="exact"))[0]


@pytest.mark.parametrize("rows", [40, 120, 200])
@pytest.mark.parametrize("rank", [4, 16])
def test_three_passes_keep_99_percent_of_what_the_exact_subspace_keeps(rows, rank):
    x = activations(600, 120, seed=1)
    weight = torch.randn(rows, 120, generator=torch.Generator().manual_seed(2))
    product = weight @ (x.T @ x)
    exact = exact_subspace(weight, x, rank)
    found = stream(x, weight, rank)
    kept = (product @ found.basis.T).square().sum() / product.square().sum()
    assert kept >= 0.99 * exact.captured_energy
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(rank), atol=1e-5, rtol=0)
    assert found.captured_energy == pytest.approx(kept.item(), rel=0.05)


def test_a_block_as_wide_as_the_matrix_is_exact():
    x = activations(200, 12, seed=5)
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(6))
    exact = exact_subspace(weight, x, 5)
    found = stream(x, weight, 5)
    torch.testing.assert_close(found.basis, exact.basis, atol=2e-3, rtol=0)
    assert found.captured_energy == pytest.approx(exact.captured_energy, abs=1e-4)


def test_fewer_tokens_than_ranks_still_give_an_orthonormal_basis():
    x = activations(3, 30, seed=7)
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(8))
    found = stream(x, weight, 8)
    assert found.determined == 3
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(8), atol=1e-5, rtol=0)
    inside = torch.linalg.qr(x.T).Q
    torch.testing.assert_close(
        (found.basis[:3] @ inside).square().sum(), torch.tensor(3.0), atol=1e-3, rtol=0
    )


def test_no_token_at_all_leaves_the_directions_of_the_weight():
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(9))
    found = stream(torch.zeros(0, 10), weight, 3)
    assert found.determined == 0
    leading = torch.linalg.svd(weight, full_matrices=False)[2][:3]
    overlap = (found.basis @ leading.T).square().sum()
    torch.testing.assert_close(overlap, torch.tensor(3.0), atol=1e-3, rtol=0)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    x = activations(100, 40, seed=10)
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(11))
    once, again, other = (stream(x, weight, 4, seed=s).basis for s in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_products_of_16_bit_rows_are_those_of_float32(monkeypatch):
    rows = torch.randn(60, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows[0, 3] = 1e4
    centered = rows.float() - rows.float().mean(dim=0)
    plain, narrow = StreamedSubspace(50, 4, 0), StreamedSubspace(50, 4, 0)
    plain.add(centered)
    monkeypatch.setattr("tlora.linalg.streamed.multiplies_narrow", lambda device: True)
    narrow.add(centered, narrow=True)
    exact = centered.double().T @ (centered.double() @ plain.block.double())
    for found in (plain.product, narrow.product):
        assert (found - exact).norm() <= 2e-5 * exact.norm()
    assert not torch.equal(plain.product, narrow.product)
