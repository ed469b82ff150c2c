"""What is said when memory runs out, and what is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import support
from support import Toy, toy_batch, toy_samples
from tlora import TLoraConfig, calibrate
from tlora.adapter import blocks
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration.accumulators import MomentAccumulator
from tlora.calibration.budget import MemoryBudget
from tlora.errors import CalibrationError

TOO_MUCH = 2**52  # bytes that no allocator gives


class _Greedy(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
        return grad


class GreedyForSequenceClassification(Toy):
    """Asks the CPU's allocator for too much, on batches of the length 6."""

    backward = False

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        hidden = self.first(x)
        if x.shape[1] == 6:
            if self.backward:
                return _Greedy.apply(hidden)
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return hidden


def batches(size: int) -> list[Any]:
    samples = toy_samples((4, 4, 6, 6))
    return [toy_batch(samples[i : i + size]) for i in range(0, 4, size)]


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("run", [calibrate, plan_in_blocks])
def test_where_it_happened_and_what_to_lower_is_said(part, run):
    model = support.seeded(GreedyForSequenceClassification).train()
    model.backward = part == "backward"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = TLoraConfig(r=2, target_modules=["first"])

    with pytest.raises(CalibrationError) as caught:
        run(model, batches(2), config)

    message = str(caught.value)
    assert message.startswith(f"out of memory in the {part} pass of samples 2 to 3")
    assert "`calibration.batch_size` on the command line; this one has 2 samples" in message
    assert "`memory_budget` (currently unlimited)" in message
    assert caught.value.__context__ is None  # it would keep the pass's tensors alive
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_of_a_single_sample_no_smaller_batch_is_asked_for():
    model = support.seeded(GreedyForSequenceClassification)
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, batches(1), TLoraConfig(r=2, target_modules=["first"]))
    assert "the forward pass of sample 2 " in str(caught.value)
    assert "shorten the samples" in str(caught.value)
    assert "batch_size" not in str(caught.value)


def test_a_devices_error_is_met_where_moments_are_added(monkeypatch):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(MomentAccumulator, "update", full)
    model = support.seeded(GreedyForSequenceClassification)
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, batches(2), TLoraConfig(r=2, target_modules=["first"]))
    assert str(caught.value).startswith(
        "out of memory in adding to the second moments of samples 0 to 1 (counted from 0):"
        " CUDA out of memory. Tried to allocate 2.00 GiB; make"
    )


def test_a_look_at_the_first_batch_that_runs_out_says_so():
    model = support.seeded(GreedyForSequenceClassification)
    config = TLoraConfig(r=2, memory_budget=300, target_modules=["first"])
    said = r"the forward pass of samples 0 to 1.*\(currently 300 B\)"
    with pytest.raises(CalibrationError, match=said):
        plan_in_blocks(model, batches(2)[::-1], config)


def test_an_automatic_budget_is_named_as_one(monkeypatch):
    monkeypatch.setattr(blocks, "resolved", lambda *_: MemoryBudget(3 * 2**30, "1/20 of much"))
    model = support.seeded(GreedyForSequenceClassification)
    said = r"`memory_budget` \(currently 3.0 GiB, auto\)"
    with pytest.raises(CalibrationError, match=said):
        plan_in_blocks(model, batches(2)[::-1], TLoraConfig(r=2, target_modules=["first"]))


def test_other_errors_pass(tiny_llama):
    model = tiny_llama()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    model.model.norm.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, support.causal_samples(), TLoraConfig(r=2))
