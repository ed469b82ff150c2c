"""Restores the user's model, and makes bitsandbytes compute as it does in training.

4-bit: on CPUs with AVX512-BF16, a Linear4bit called in eval mode with an input that needs no
gradient rewrites its weight for a faster kernel (bitsandbytes/nn/modules.py, Linear4bit.forward).
This rounds the scales to bfloat16 irreversibly, and from then on no gradient passes the layer, not
even in training; nothing is raised. Each layer has its own switch for this, which is turned off
here wherever gradients are needed.

8-bit: eval mode also quantizes the inputs; training mode multiplies by the dequantized weight
(bitsandbytes/autograd/_functions.py, matmul). Calibration must see the computation of training. On
a GPU both modes quantize the inputs, so the mode makes no difference there.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tlora.calibration.placement import offload_again
from tlora.calibration.weights import is_4bit_linear, is_8bit_linear, repacked
from tlora.errors import AdapterError, CalibrationError, TLoraError

# The attribute that identifies gradient checkpointing in transformers and timm models.
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run the body with every parameter frozen and the model in eval mode; then restore both.

    Freezing means that a backward pass forms no weight gradient and leaves ``.grad`` alone; eval
    mode turns dropout off. Gradient checkpointing is off too, and quantized layers use the kernels
    of training (`gradients_kept`, `train_8bit`).

    Restored after the body, also if it raises: ``requires_grad`` of each parameter, mode and
    switches of each module, and the random states of Python, NumPy (if loaded) and torch, so that
    runs with and without calibration draw the same numbers. Offloaded parameters are offloaded
    again.
    """
    modes = [(module, module.training) for module in model.modules()]
    # By position: an offloaded parameter is another object after each call of its module.
    needs = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    with random_states_kept(), gradients_kept(model), _activations_kept(model):
        try:
            for module, name, _ in needs:
                module.get_parameter(name).requires_grad_(False)
            model.eval()
            train_8bit(model)
            yield
        finally:
            offload_again(model)
            for module, training in modes:
                module.training = training
            for module, name, needed in needs:
                module.get_parameter(name).requires_grad_(needed)


@contextlib.contextmanager
def _activations_kept(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off while the body runs: some use it in eval mode too."""
    on = [
        (module, switch)
        for module in model.modules()
        for switch in _CHECKPOINTING
        if vars(module).get(switch) is True
    ]
    try:
        for module, switch in on:
            setattr(module, switch, False)
        yield
    finally:
        for module, switch in on:
            setattr(module, switch, True)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy (if loaded) and torch after the body."""
    python_state = random.getstate()
    numpy_random = _numpy_random()
    numpy_state = numpy_random.get_state() if numpy_random else None
    with torch.random.fork_rng(devices=_devices()):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)


def _numpy_random() -> Any:
    import sys

    return sys.modules.get("numpy.random")


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextlib.contextmanager
def undo_after(model: nn.Module) -> Iterator[None]:
    """Run the body with the model frozen and in eval mode; then restore all but the weights.

    Like `preserved`, and also restores the hooks, the attributes of each module and the gradients,
    even if the body raises halfway through.
    """
    before = [(module, _snapshot(module)) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with preserved(model):
        try:
            yield
        finally:
            for module, (names, hooks) in before:
                _restore(module, names, hooks)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _snapshot(module: nn.Module) -> tuple[set[str], dict[str, dict[Any, Any]]]:
    hooks = {name: dict(held) for name, held in vars(module).items() if _holds_hooks(name, held)}
    return set(vars(module)), hooks


def _restore(module: nn.Module, names: set[str], hooks: dict[str, dict[Any, Any]]) -> None:
    for name in set(vars(module)) - names:
        del vars(module)[name]
    for name, held in hooks.items():
        vars(module)[name].clear()
        vars(module)[name].update(held)


def _holds_hooks(name: str, held: Any) -> bool:
    return isinstance(held, dict) and "_hooks" in name


_SWITCH = "support_avx512bf16_for_cpu"


def keep_gradients(model: nn.Module) -> None:
    """Switch the inference kernels of 4-bit layers off permanently; other models are unaffected.

    Raises:
        AdapterError: a layer has already been rewritten.
    """
    refuse_repacked(model, AdapterError)
    for layer in _switched(model):
        setattr(layer, _SWITCH, False)


@contextlib.contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Switch them off while the body runs, then restore the switches.

    Raises:
        CalibrationError: a layer has already been rewritten.
    """
    refuse_repacked(model, CalibrationError)
    before = [(layer, getattr(layer, _SWITCH)) for layer in _switched(model)]
    try:
        for layer, _ in before:
            setattr(layer, _SWITCH, False)
        yield
    finally:
        for layer, value in before:
            setattr(layer, _SWITCH, value)


def train_8bit(model: nn.Module) -> None:
    """Put the 8-bit layers into training mode; they have no dropout."""
    for module in model.modules():
        if is_8bit_linear(module):
            module.train()


def _switched(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if is_4bit_linear(m) and hasattr(m, _SWITCH)]


def refuse_repacked(model: nn.Module, error: type[TLoraError]) -> None:
    """Raise ``error`` if a 4-bit layer has been rewritten for inference and blocks gradients."""
    names = [name for name, module in model.named_modules() if repacked(module)]
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise error(
            f"{names[0]}{more}: bitsandbytes has rewritten its 4-bit weight for inference on "
            "this CPU (a call in eval mode without gradient), and gradients no longer pass "
            "it; reload the model, and calibrate and attach before running it."
        )
