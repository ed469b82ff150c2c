"""Mean gradients, the moments they weight and squared gradients, against autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from support import Sample, distance
from tlora import Calibration, TLoraConfig, calibrate

BASES = ["gradient", "gradient-covariance", "gradient-moment", "weight-gradient-moment"]


def config(basis: str = "gradient", **fields: Any) -> TLoraConfig:
    return TLoraConfig(
        **({"r": 2, "lora_alpha": 2, "sensitivity_rule": "fisher"} | fields), basis=basis
    )


@dataclass
class Expected:
    """docs/method.md, 9, in float64."""

    fisher: float
    gradient: Tensor
    moment: Tensor


def by_autograd(model: Any, samples: Sequence[Sample], names: Iterable[str]) -> dict[str, Expected]:
    """Follow the definition, one sample at a time: N from each token's gradient of the output."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for name, seen in calls.items():
        module = model.get_submodule(name)
        module.weight.requires_grad_(True)
        module.register_forward_hook(
            lambda _, x, kw, y, to=seen: _note(to, x[0] if x else kw["input"], y),
            with_kwargs=True,
        )
    found = {}
    for name in calls:
        weight = as_matrix(model.get_submodule(name), model.get_submodule(name).weight)
        square = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        found[name] = Expected(0.0, torch.zeros_like(weight), square)
    for sample in samples:
        for seen in calls.values():
            seen.clear()
        model.zero_grad(set_to_none=True)
        loss = model(**support.as_double(sample)).loss
        if not loss.requires_grad:
            continue
        loss.backward()
        for name, want in found.items():
            module = model.get_submodule(name)
            if module.weight.grad is None:
                continue
            gradient = as_matrix(module, module.weight.grad)
            want.gradient += gradient / len(samples)
            want.fisher += gradient.square().mean().item() / len(samples)
            for x, y in calls[name]:
                if y.grad is not None:
                    rows = x.detach().reshape(-1, x.shape[-1])
                    size = y.grad.reshape(len(rows), -1).square().sum(dim=1)
                    want.moment += rows.T @ (size[:, None] * rows) / len(samples)
    return found


def _note(to: list[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> None:
    y.retain_grad()
    to.append((x, y))


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.detach().T if hasattr(module, "nx") else weight.detach()


def assert_agrees(stats: Calibration, expected: dict[str, Expected]) -> None:
    assert list(stats.modules) == list(expected)
    for name, module in stats.modules.items():
        want = expected[name]
        if module.gradient is not None:
            assert module.gradient.dtype == torch.float32
            assert distance(module.gradient, want.gradient) < 1e-4, name
        if module.gradient_moment is not None:
            assert distance(module.gradient_moment.covariance(), want.moment) < 1e-4, name
        if module.fisher is not None:
            assert module.fisher == pytest.approx(want.fisher, rel=1e-4), name


@pytest.mark.parametrize("size", [1, 2, 5])
def test_padded_batches_give_what_the_samples_give_one_at_a_time(family, size):
    names = None
    for basis in ("gradient", "weight-gradient-moment"):
        stats = calibrate(family.model, family.batches(size), config(basis, **family.config))
        names = names or by_autograd(family.model, family.samples, stats.modules)
        assert stats.samples == len(family.samples)
        assert_agrees(stats, names)
        module = next(iter(stats.modules.values()))
        assert module.fisher is not None
        assert (module.sensitivity, module.moment) == (None, None)
        assert (module.gradient is None) is (basis != "gradient")
        assert (module.gradient_moment is None) is (basis == "gradient")
