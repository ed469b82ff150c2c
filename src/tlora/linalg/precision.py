"""Keeping the mathematics in float32 where the caller runs the model under autocast or TF32."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

_DEVICES = ("cpu", "cuda", "xpu", "mps")

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``function`` multiply in the dtype of what it is given, whatever autocast says.

    Autocast would round the factors of each product to 16 bits, and TF32 (`tf32` of the trainer)
    to 10 of mantissa: second moments, gradients and subspaces would be those of rounded numbers.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_tf32())
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    # Torch before 2.9 has one switch; to set the newer one afterwards would be refused.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)
