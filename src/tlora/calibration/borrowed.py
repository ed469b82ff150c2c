"""Running another library's calibration on a model, and leaving nothing of it behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from tlora.calibration.preserve import preserved


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Run the body with the model frozen and in eval mode; then undo all it did but to weights.

    As `preserved`; besides, the hooks, the attributes of each module and the gradients are as
    before, also when the body raises halfway through.
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
