"""Cholesky QR against Householder's QR and float64."""

from __future__ import annotations

import pytest
import torch

from tlora.linalg import orthogonal
from tlora.linalg.orthogonal import batches, eigenpairs, inverse_factors, on_host, orthonormal, read


@pytest.fixture(autouse=True)
def cholesky_on_the_cpu(monkeypatch):
    monkeypatch.setattr(orthogonal, "BATCHED", {"cpu"})


def columns(rows: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix of these singular values, its columns in no order."""
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(n, len(values), generator=generator).double() for n in (rows, 1000)]
    left = torch.linalg.qr(random[0]).Q
    right = torch.linalg.qr(random[1]).Q[: len(values)]
    return (left * values @ torch.linalg.qr(right).Q).float()


def deviation(block: torch.Tensor) -> float:
    gram = block.double().T @ block.double()
    return (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max().item()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The sine of the largest angle from the span of one to that of the other."""
    one, other = one.double(), torch.linalg.qr(other.double()).Q
    return torch.linalg.matrix_norm(one - other @ (other.T @ one), 2).item()


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e6])
def test_columns_are_orthonormal_and_span_what_householder_s_do(condition):
    block = columns(300, torch.logspace(0, -torch.tensor(condition).log10().item(), 40).double())
    (found,) = orthonormal([block])
    assert found.dtype == torch.float32
    assert deviation(found) < 1e-6
    # Householder's rounding reaches as far, the smallest direction being 1 / condition.
    assert distance(found, block) < max(1e-6, 1e-6 * condition / 5)


@pytest.mark.parametrize("condition", [1e0, 1e6])
def test_cholesky_alone_solves_what_is_well_determined(condition, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("Householder was asked")

    block = columns(200, torch.linspace(1, 1 / condition, 30).double())
    monkeypatch.setattr(torch.linalg, "qr", refused)
    assert deviation(orthonormal([block])[0]) < 1e-6


@pytest.mark.parametrize(
    "block",
    [
        torch.zeros(50, 8),
        torch.ones(50, 8),
        columns(50, torch.tensor([1.0, 1, 1, 0, 0, 0]).double()),
        columns(50, torch.tensor([1.0, 1, 1, 1e-9, 1e-9]).double()),
    ],
    ids=["zero", "equal", "rank 3", "condition 1e9"],
)
def test_columns_that_depend_on_each_other_get_householder_s(block):
    whole = columns(60, torch.linspace(1, 0.5, 7).double(), seed=1)
    found = orthonormal([whole, block])
    assert torch.equal(found[1], torch.linalg.qr(block).Q)
    assert deviation(found[1]) < 1e-5
    assert torch.equal(found[0], orthonormal([whole])[0])


def test_a_failed_factorization_takes_householder_s(monkeypatch):
    block = columns(80, torch.linspace(1, 0.1, 12).double())
    real = torch.linalg.cholesky_ex

    def failing(*args, **options):
        lower, info = real(*args, **options)
        return lower, torch.ones_like(info)

    expected = orthonormal([block])[0]
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    (found,) = orthonormal([block])
    assert torch.equal(found, torch.linalg.qr(block).Q)
    assert distance(found, expected) < 1e-5


def test_float64_stays_float64():
    block = columns(80, torch.linspace(1, 0.1, 12).double()).double()
    (found,) = orthonormal([block])
    assert found.dtype == torch.float64
    assert deviation(found) < 1e-14


def test_a_block_gets_the_same_bits_whatever_the_others():
    blocks = [columns(100 + 20 * n, torch.linspace(1, 1e-3, 16).double(), n) for n in range(4)]
    blocks.append(columns(90, torch.linspace(1, 1e-3, 9).double()))
    together = orthonormal(blocks)
    assert all(torch.equal(orthonormal([b])[0], q) for b, q in zip(blocks, together, strict=True))


def test_inverse_factors_turn_a_gram_matrix_into_the_identity():
    blocks = [columns(70, torch.logspace(0, -3, n).double()) for n in (5, 11, 5)]
    grams = [orthogonal.gram(block) for block in blocks]
    inverses, least = inverse_factors(grams)
    for gram, inverse, smallest in zip(grams, inverses, least, strict=True):
        eye = torch.eye(len(gram), dtype=torch.float64)
        torch.testing.assert_close(inverse.T @ gram @ inverse, eye, atol=1e-8, rtol=0)
        assert torch.equal(inverse, inverse.triu())
        assert 0 < smallest <= 1


def test_eigenpairs_come_largest_first_and_none_is_negative():
    matrices = [torch.diag(torch.tensor(v).double()) for v in ([1.0, 3.0, -1e-18], [2.0, 5.0])]
    (three, vectors), (two, _) = eigenpairs(matrices)
    assert three.tolist() == [3, 1, 0]
    assert two.tolist() == [5, 2]
    assert vectors.abs()[:, 0].tolist() == [0, 1, 0]


def test_batches_are_neighbors_that_fit_and_what_does_not_is_alone():
    assert list(batches([], 10)) == []
    assert list(batches([4, 6, 1, 11, 2], 10)) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(batches([5, 5], 0)) == [range(1), range(1, 2)]


def test_values_are_read_and_tensors_come_back_in_their_order():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    assert read(tensors) == [[1, 2], [3, 4]]
    assert read([]) == on_host([]) == []
    assert all(map(torch.equal, on_host(tensors), tensors))
