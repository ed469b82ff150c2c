"""What is taken from gradients, formed block by block, against the whole products in float64."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tlora.linalg import gradients
from tlora.linalg.gradients import (
    Pairs,
    Rows,
    add_gradient,
    gradient_weighted,
    squared_norm,
    weighted_magnitude,
)


def pair(tokens: int, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, rows, generator=generator),
        torch.randn(tokens, columns, generator=generator),
    )


def total(weight: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
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
            if isinstance(out, Tensor) and out._base is None:
                largest = max(largest, out.numel())
            return out

    pairs = [[pair(2, 40, 10, seed)] for seed in range(samples)]
    with Watch():
        weighted_magnitude(weight, pairs)
    assert 0 < largest <= 4 * 10


DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LAYOUTS: dict[str, list[list[int]]] = {
    "equal": [[6], [6], [6]],
    "ragged": [[6], [0], [9], []],
    "calls": [[6, 2], [6], [1, 0, 5]],
    "empty": [[0], [0]],
}
"""Tokens of each call of each sample."""


def batch(layout: str, dtype: torch.dtype, outlier: float = 1) -> list[Pairs]:
    """Samples in ``dtype``, m = 40 and d = 24; column 3 of x and 5 of delta are massive."""
    samples = []
    for s, calls in enumerate(LAYOUTS[layout]):
        pairs = [pair(tokens, 40, 24, seed=10 * s + c) for c, tokens in enumerate(calls)]
        for delta, x in pairs:
            delta[:, 5] *= outlier
            x[:, 3] *= outlier
        samples.append([(delta.to(dtype), x.to(dtype)) for delta, x in pairs])
    return samples


def whole_gradients(samples: list[Pairs]) -> list[Tensor]:
    """The gradient of each sample in float64."""
    zero = torch.zeros(40, 24, dtype=torch.float64)
    return [sum((d.double().T @ x.double() for d, x in pairs), start=zero) for pairs in samples]


def as_on_an_accelerator(monkeypatch, entries: int = 2**23) -> None:
    """Take the path of accelerators, in 16-bit products, without the kernel."""
    monkeypatch.setattr(gradients, "_is_cpu", lambda _: False)
    monkeypatch.setattr(gradients, "_DEVICE_ENTRIES", entries)
    monkeypatch.setattr(gradients, "_fuses", lambda *_: False)
    monkeypatch.setattr("tlora.linalg.products.multiplies_narrow", lambda _: True)
    monkeypatch.setattr("tlora.linalg.products._narrow_product", lambda a, b: a.float() @ b.float())


@pytest.mark.parametrize("entries", [None, 1, 7 * 24 * 3, 2**23])
@pytest.mark.parametrize("outlier", [1, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_path_gives_the_definition(monkeypatch, layout, dtype, outlier, entries):
    if entries is not None:
        as_on_an_accelerator(monkeypatch, entries)
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    samples = batch(layout, dtype, outlier)
    for stored in (weight, weight.to(torch.bfloat16), weight.T.contiguous().T.half()):
        expected = torch.stack(
            [(stored.double() * each).abs().sum() for each in whole_gradients(samples)]
        )
        found = weighted_magnitude(stored, samples)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["equal", "ragged", "calls"])
def test_own_losses_are_weighed_without_rounding_to_16_bits(
    monkeypatch, layout, dtype, accelerator
):
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    samples = batch(layout, dtype)
    weights = [1.37, 0.9, 1.37, 3.01][: len(samples)]
    expected = [w * g for w, g in zip(weights, whole_gradients(samples), strict=True)]
    total = torch.ones(40, 24)
    add_gradient(total, samples, weights)
    torch.testing.assert_close(total.double(), 1 + sum(expected), rtol=1e-6, atol=1e-5)

    rows = gradient_weighted(samples, weights)
    scaled = [
        (w * d.double()).norm(dim=1, keepdim=True) * x.double()
        for w, pairs in zip(weights, samples, strict=True)
        for d, x in pairs
    ]
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), torch.cat(scaled), rtol=1e-6, atol=0)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms_of_16_bit_rows_are_those_of_the_gradient(
    monkeypatch, dtype, tokens, accelerator
):
    if accelerator:
        as_on_an_accelerator(monkeypatch, entries=7 * 24)
    calls = [pair(tokens, 40, 24, seed) for seed in (1, 2)]
    samples: list[Pairs] = [[(d.to(dtype), x.to(dtype)) for d, x in calls], []]
    expected = torch.stack([each.square().sum() for each in whole_gradients(samples)])
    found = squared_norm(samples)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_rows_that_lie_one_after_the_other_are_joined_without_a_copy():
    delta, x = pair(9, 4, 3, seed=1)
    rows = Rows.of([[(delta[:2], x[:2]), (delta[2:5], x[2:5])], [(delta[5:], x[5:])]])
    assert rows.counts == (5, 4)
    assert (rows.delta.data_ptr(), rows.x.data_ptr()) == (delta.data_ptr(), x.data_ptr())
    assert torch.equal(rows.delta, delta)
    apart = Rows.of([[(delta[:2], x[:2])], [(delta[5:], x[5:])], [(delta[2:5], x[2:5])]])
    assert torch.equal(apart.x, torch.cat([x[:2], x[5:], x[2:5]]))
    turned = Rows.of([[(delta.T[:2].contiguous().T, x[:, :2])]])
    assert torch.equal(turned.x, x[:, :2])


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (None, "ModuleNotFoundError"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
        (lambda *_: torch.ones(3), "ArithmeticError: the kernel gives"),
    ],
    ids=["missing", "broken", "wrong"],
)
def test_a_kernel_that_does_not_run_is_said_once_and_done_without(
    monkeypatch, caplog, kernel, reason
):
    asked = gradients._fuses
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(gradients, "_fuses", asked)
    monkeypatch.setattr(gradients, "multiplies_narrow", lambda _: True)
    module = types.SimpleNamespace(weighted_magnitudes=kernel) if kernel else None
    monkeypatch.setitem(sys.modules, "tlora.linalg.kernels", module)
    asked.cache_clear()
    samples = batch("ragged", torch.bfloat16)
    weight = torch.randn(40, 24)
    with caplog.at_level(logging.WARNING):
        found = [weighted_magnitude(weight, samples) for _ in range(2)]
    asked.cache_clear()
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "using the slower unfused computation" in record.getMessage()
    assert torch.equal(found[0], gradients.batched_magnitude(weight, Rows.of(samples)))
    assert torch.equal(*found)


def test_a_device_without_memory_for_the_example_is_no_verdict(monkeypatch):
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gradients, "multiplies_narrow", lambda _: True)
    monkeypatch.setattr(gradients, "fused_magnitude", full)
    gradients._fuses.cache_clear()
    asked = (torch.device("cpu"), torch.float16, torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        gradients._fuses(*asked)
    monkeypatch.setattr(gradients, "fused_magnitude", gradients.batched_magnitude)
    assert gradients._fuses(*asked)
    assert not gradients._fuses(torch.device("cpu"), torch.float32, torch.float32)
    gradients._fuses.cache_clear()
