"""Products of 16-bit factors and of bfloat16 terms equal the float64 products."""

import pytest
import torch

from tlora.linalg.products import product, product_of_terms, terms


def matrices(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(40, 96, generator=generator) * torch.logspace(-4, 4, 96)
    right = torch.randn(96, 24, generator=generator)
    return left.to(dtype), right.to(dtype)


def error(found, left, right):
    exact = left.double() @ right.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_loses_nothing_of_the_factors(dtype):
    left, right = matrices(dtype)
    found = product(left, right)
    assert found.dtype == torch.float32
    assert error(found, left, right) < 1e-6


def test_three_terms_are_a_float32_number():
    left, _ = matrices()
    assert torch.equal(sum(term.double() for term in terms(left, 3)), left.double())


def test_two_terms_are_a_float16_number():
    left, _ = matrices()
    half = (left / 100).half()
    assert torch.equal(sum(term.double() for term in terms(half, 2)), half.double())


def test_a_bfloat16_matrix_is_its_own_term():
    left, _ = matrices(torch.bfloat16)
    assert [term is left for term in terms(left, 3)] == [True]


@pytest.mark.parametrize(("count", "bound"), [(1, 5e-3), (2, 2e-5), (3, 1e-6)])
def test_the_error_falls_by_eight_bits_a_term(count, bound):
    left, right = matrices()
    found = product_of_terms(terms(left, count), terms(right, count))
    assert error(found, left, right) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_times_three_terms_is_the_float32_product(dtype):
    left, right = matrices()
    left = (left / 100).to(dtype)
    assert error(product_of_terms(terms(left, 2), terms(right, 3)), left, right) < 1e-6


def test_no_term_is_an_error():
    with pytest.raises(ValueError, match="no term"):
        product_of_terms([], [torch.ones(2, 2)])
