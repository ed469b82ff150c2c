"""Leaving the user's model as it was, whatever happens in between."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import nn

from tlora.calibration.cpu_kernels import gradients_kept, train_8bit
from tlora.calibration.offload import offload_again

# The attribute by which models of transformers, and those of timm, are told.
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run the body with every parameter frozen and the model in eval mode; then undo both.

    Frozen, so that a backward pass forms no weight gradient and touches no ``.grad``; eval, so
    that dropout is off. Gradient checkpointing is off too, and quantised layers run by the kernels
    that training uses (`cpu_kernels`).

    Restored after the body, also when it raises: ``requires_grad`` of each parameter, mode and
    switches of each module, and the random states of Python, NumPy (where loaded) and torch, so
    that a run with calibration draws the numbers that a run without it draws. Offloaded parameters
    are offloaded again.
    """
    modes = [(module, module.training) for module in model.modules()]
    # By place: an offloaded parameter is another object after each call of its module.
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
    """Switch gradient checkpointing off while the body runs: some have it in eval mode too."""
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
    """Give the random states of Python, NumPy (where loaded) and torch back after the body."""
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


def _numpy_random():
    import sys

    return sys.modules.get("numpy.random")


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
