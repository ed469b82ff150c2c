"""Keeping the mathematics in float32 where the caller runs the model under autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_DEVICES = ("cpu", "cuda", "xpu", "mps")

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``function`` multiply in the dtype of what it is given, whatever autocast says.

    Autocast would round the factors of each product to 16 bits: second moments, gradients and
    subspaces would be those of rounded numbers.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped
