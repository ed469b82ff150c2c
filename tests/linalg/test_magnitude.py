"""sum |W * G|, formed block by block, against the whole product."""

from __future__ import annotations

import pytest
import torch

from tlora.linalg import magnitude
from tlora.linalg.magnitude import weighted_magnitude


def pair(tokens: int, rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, rows, generator=generator),
        torch.randn(tokens, columns, generator=generator),
    )


@pytest.mark.parametrize("entries", [1, 7 * 5, 10**6])
@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (8, 8), (1, 7)])
def test_blocks_of_any_size_give_the_sum_over_the_whole_gradient(monkeypatch, entries, shape):
    monkeypatch.setattr(magnitude, "_CPU_ENTRIES", entries)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    delta, x = pair(11, *shape, seed=4)
    expected = (weight.double() * (delta.double().T @ x.double())).abs().sum()
    found = weighted_magnitude(weight.abs(), [(delta, x)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_calls_add_up_before_the_absolute_value():
    weight = torch.ones(4, 3)
    delta, x = pair(5, 4, 3, seed=1)
    once = weighted_magnitude(weight, [(delta, x)])
    assert once > 0
    torch.testing.assert_close(weighted_magnitude(weight, [(delta, x), (delta, x)]), 2 * once)
    cancelled = weighted_magnitude(weight, [(delta, x), (-delta, x)])
    torch.testing.assert_close(cancelled, torch.zeros(()), atol=1e-5, rtol=0)


def test_no_call_and_no_token_give_zero():
    weight = torch.ones(4, 3)
    assert weighted_magnitude(weight, []) == 0
    assert weighted_magnitude(weight, [(torch.zeros(0, 4), torch.zeros(0, 3))]) == 0


def test_the_weight_may_be_a_transposed_view():
    weight = torch.rand(3, 4).T
    delta, x = pair(5, 4, 3, seed=2)
    expected = (weight * (delta.T @ x)).abs().sum()
    torch.testing.assert_close(weighted_magnitude(weight, [(delta, x)]), expected)
