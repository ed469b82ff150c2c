"""Making bitsandbytes' layers compute on a CPU what they compute while training.

4-bit: on CPUs with AVX512-BF16, a Linear4bit that is called in eval mode with an input that needs
no gradient rewrites its weight for a faster kernel (bitsandbytes/nn/modules.py,
Linear4bit.forward). The scales are rounded to bfloat16 on the way, which cannot be undone, and from
then on no gradient passes the layer, in training neither; nothing is raised. Each layer has a
switch of its own for it, which is set off here wherever gradients are wanted.

8-bit: eval mode also quantises the inputs; training mode multiplies by the dequantised weight
(bitsandbytes/autograd/_functions.py, matmul), and what is calibrated is what will be trained.
On a GPU both modes quantise the inputs, so there the mode makes no difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from tlora.calibration.weights import is_4bit_linear, is_8bit_linear, repacked
from tlora.errors import AdapterError, CalibrationError, TLoraError

_SWITCH = "support_avx512bf16_for_cpu"


def keep_gradients(model: nn.Module) -> None:
    """Switch the inference kernels of 4-bit layers off for good; other models are left alone.

    Raises:
        AdapterError: a layer has been rewritten already.
    """
    refuse_repacked(model, AdapterError)
    for layer in _switched(model):
        setattr(layer, _SWITCH, False)


@contextlib.contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Switch them off while the body runs; then set the switches as they were.

    Raises:
        CalibrationError: a layer has been rewritten already.
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
    """Raise ``error`` if a 4-bit layer has been rewritten for inference; none passes gradients."""
    names = [name for name, module in model.named_modules() if repacked(module)]
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise error(
            f"{names[0]}{more}: bitsandbytes has rewritten its 4-bit weight for inference on this"
            " CPU (a call in eval mode without gradient), and no gradient passes it any more; load"
            " the model anew, and calibrate and attach before running it."
        )
