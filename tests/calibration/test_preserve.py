"""The user's model, gradients, modes, hooks and random states after `calibrate`, to the bit."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import support
from tlora import TLoraConfig, TLoraError, calibrate
from tlora.calibration.collector import MicroBatch

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def bits(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().contiguous().numpy().tobytes()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the process that a calibration could disturb."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = list(model.named_modules())
    return {
        "bits": {name: bits(value) for name, value in tensors},
        "identity": [(name, id(value), value.data_ptr(), value.dtype) for name, value in tensors],
        "needs": [(name, value.requires_grad) for name, value in tensors],
        "grads": [(name, id(value.grad), bits(value.grad)) for name, value in tensors],
        "modes": [(name, module.training) for name, module in modules],
        "checkpointing": [
            (name, getattr(module, "gradient_checkpointing", None)) for name, module in modules
        ],
        "hooks": [
            (name, kind, list(getattr(module, kind) or ()))
            for name, module in modules
            for kind in _HOOKS
        ],
        "attributes": [(name, sorted(vars(module))) for name, module in modules],
        "torch": bits(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": [x.tobytes() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "grad_mode": torch.is_grad_enabled(),
    }


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    """A model in the middle of somebody's training, with nothing at its default."""
    model = tiny_llama(attention_dropout=0.1).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(**support.padded(support.causal_samples())).loss.backward()
    for index, (_, parameter) in enumerate(model.named_parameters()):
        if index % 3 == 0:
            parameter.requires_grad_(False)
        if index % 4 == 0:
            parameter.grad = None
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    model.model.layers[0].mlp.register_full_backward_hook(lambda *_: None)
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)
    return model


def noisy(batches: list, fault: Callable[[], None] | None = None) -> Iterator[Any]:
    """Batches from an iterator that draws random numbers, and may fail after two."""
    for index, batch in enumerate(batches):
        torch.rand(3), random.random(), np.random.rand()
        if index == 2 and fault:
            fault()
        yield batch


def stopped() -> None:
    raise KeyboardInterrupt


def batches() -> list[support.Sample]:
    return support.in_batches(support.causal_samples((5, 6, 4, 7, 5, 3)), 2)


def test_a_calibration_leaves_no_trace(model):
    before = snapshot(model)
    stats = calibrate(model, noisy(batches()), TLoraConfig(r=2))
    assert stats.samples == 6
    assert snapshot(model) == before


def test_an_iterator_that_fails_leaves_no_trace(model):
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, noisy(batches(), stopped), TLoraConfig(r=2))
    assert snapshot(model) == before


@pytest.mark.parametrize("fault", ["forward", "deep", "backward", "nan", "wrong", "labels"])
def test_a_batch_that_fails_leaves_no_trace(model, fault):
    broken = batches()
    expected: type[BaseException] = TLoraError
    if fault == "forward":
        broken[2]["input_ids"][0, 0] = 10_000
    if fault in ("deep", "backward"):
        calls = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise ZeroDivisionError

        layer = model.model.layers[1].mlp.act_fn
        kinds = {"deep": "register_forward_hook", "backward": "register_full_backward_hook"}
        getattr(layer, kinds[fault])(fail)
        expected = ZeroDivisionError
    if fault == "nan":
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
    if fault == "wrong":
        broken[2] = "text"
    if fault == "labels":
        broken[2]["labels"][:] = -100
    before = snapshot(model)

    with pytest.raises(expected):
        calibrate(model, noisy(broken), TLoraConfig(r=2))

    assert snapshot(model) == before


def test_training_after_a_calibration_draws_what_it_draws_without(tiny_llama):
    batch = support.padded(support.causal_samples())
    drawn = []
    for calibrated in (False, True):
        torch.manual_seed(3)
        model = tiny_llama(attention_dropout=0.5).train()
        if calibrated:
            calibrate(model, noisy([batch]), TLoraConfig(r=2))
        drawn.append((model(**batch).loss.item(), random.Random(0).random(), torch.rand(2)))
    assert drawn[0][0] == drawn[1][0]
    assert torch.equal(drawn[0][2], drawn[1][2])


def test_the_snapshot_sees_a_disturbance(model):
    before = snapshot(model)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert snapshot(model) != before
    handle.remove()
    assert snapshot(model) == before
    torch.rand(1)
    assert snapshot(model) != before


def test_a_calibration_found_in_its_file_draws_no_numbers_either(tiny_llama, tmp_path):
    model, config = tiny_llama(), TLoraConfig(r=2, lora_alpha=2)
    samples = support.causal_samples()
    loader = torch.utils.data.DataLoader(samples, batch_size=None, shuffle=True)
    for _ in ("measured", "found"):
        torch.manual_seed(3)
        before = snapshot(model)
        calibrate(model, loader, config, cache=tmp_path / "cache.safetensors")
        assert snapshot(model) == before


def test_batches_are_let_go_once_they_are_read(tiny_llama):
    held = []

    def batches():
        for sample in support.causal_samples():
            yield sample
            held.append(sum(isinstance(each, MicroBatch) for each in gc.get_objects()))

    calibrate(tiny_llama(), batches(), TLoraConfig(r=2, lora_alpha=2))
    assert max(held) <= 1
