"""The packed lower triangle against the dense matrix."""

import pytest
import torch

from tlora.linalg.packed import BLOCK, PackedTriangle, packed_numbers

SIZES = [1, 5, 255, 256, 257, 600, 1300]


def triangle(dim, tokens=40, dtype=torch.float64):
    rows = torch.randn(tokens, dim, dtype=dtype, generator=torch.Generator().manual_seed(dim))
    packed = PackedTriangle(torch.zeros(packed_numbers(dim), dtype=dtype), dim)
    packed.add_gram(rows[: tokens // 2])
    packed.add_gram(rows[tokens // 2 :])
    return packed, rows.T @ rows


@pytest.mark.parametrize("dim", SIZES)
def test_it_is_the_gram_matrix(dim):
    packed, whole = triangle(dim)
    found = packed.dense()
    torch.testing.assert_close(found, whole)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(packed.diagonal(), whole.diagonal())


@pytest.mark.parametrize("dim", SIZES)
def test_it_takes_half_of_the_room_and_half_a_block_row_more(dim):
    assert packed_numbers(dim) == sum(view.numel() for *_, view in triangle(dim)[0].block_rows())
    assert packed_numbers(dim) <= dim**2 / 2 + BLOCK * dim / 2


@pytest.mark.parametrize("step", [BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("dim", SIZES)
def test_a_product_is_that_with_the_dense_matrix(dim, step, monkeypatch):
    packed, whole = triangle(dim)
    weight = torch.randn(3, dim, dtype=torch.float64)
    monkeypatch.setattr("tlora.linalg.packed._columns_at_once", lambda device: step)
    torch.testing.assert_close(packed.left_times(weight), weight @ whole)


def test_what_lies_above_the_diagonal_of_a_block_does_not_count():
    packed, whole = triangle(600)
    for start, _, block in packed.block_rows():
        block[:, start:] += torch.full_like(block[:, start:], 9.0).triu(1)
    torch.testing.assert_close(packed.dense(), whole)


@pytest.mark.parametrize("dim", SIZES)
def test_wide_steps_of_16_bit_terms_give_the_same(dim, monkeypatch):
    rows = torch.randn(40, dim)
    packed = PackedTriangle(torch.zeros(packed_numbers(dim)), dim)
    monkeypatch.setattr("tlora.linalg.packed.multiplies_narrow", lambda device: True)
    packed.add_gram(rows, narrow=True)
    exact = rows.double().T @ rows.double()
    assert (packed.dense() - exact).norm() <= 1e-5 * exact.norm()
