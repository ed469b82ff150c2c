"""sum |W * G_s|, formed block by block, against the whole products."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tlora.linalg import gradients
from tlora.linalg.gradients import weighted_magnitude


def pair(tokens: int, rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, rows, generator=generator),
        torch.randn(tokens, columns, generator=generator),
    )


def total(weight: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Of one sample."""
    return weighted_magnitude(weight, [pairs])[0]


@pytest.mark.parametrize("entries", [1, 7 * 5, 10**6])
@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (8, 8), (1, 7)])
def test_blocks_of_any_size_give_the_sum_over_the_whole_gradient(monkeypatch, entries, shape):
    monkeypatch.setattr(gradients, "_CPU_ENTRIES", entries)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    pairs = [pair(11, *shape, seed=4), pair(3, *shape, seed=5)]
    whole = [delta.double().T @ x.double() for delta, x in pairs]
    expected = torch.stack([(weight.double() * each).abs().sum() for each in whole])
    before = weight.clone()
    found = weighted_magnitude(weight, [[each] for each in pairs])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(weight, before)


def test_calls_add_up_before_the_absolute_value_and_samples_after():
    weight = torch.ones(4, 3)
    delta, x = pair(5, 4, 3, seed=1)
    once = total(weight, (delta, x))
    assert once > 0
    torch.testing.assert_close(total(weight, (delta, x), (delta, x)), 2 * once)
    canceled = total(weight, (delta, x), (-delta, x))
    torch.testing.assert_close(canceled, torch.zeros(()), atol=1e-5, rtol=0)
    apart = weighted_magnitude(weight, [[(delta, x)], [], [(-delta, x)]])
    torch.testing.assert_close(apart, torch.stack([once, torch.zeros(()), once]))


def test_no_call_and_no_token_give_zero():
    weight = torch.ones(4, 3)
    assert total(weight) == 0
    assert total(weight, (torch.zeros(0, 4), torch.zeros(0, 3))) == 0


def test_the_weight_may_be_a_transposed_view():
    weight = torch.randn(3, 4).T
    delta, x = pair(5, 4, 3, seed=2)
    expected = (weight * (delta.T @ x)).abs().sum()
    torch.testing.assert_close(total(weight, (delta, x)), expected)


@pytest.mark.parametrize("samples", [1, 3])
def test_no_copy_of_the_weight_is_made(monkeypatch, samples):
    monkeypatch.setattr(gradients, "_CPU_ENTRIES", 4 * 10)
    weight = torch.randn(40, 10)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                largest = max(largest, out.numel())
            return out

    pairs = [[pair(2, 40, 10, seed)] for seed in range(samples)]
    with Watch():
        weighted_magnitude(weight, pairs)
    assert 0 < largest <= 4 * 10
