"""The released rule, as one would write it down: what `init.py` compares the library with.

Every module has a second moment of its own, the gradients of all targeted weights are alive at
once, samples come one at a time, and the SVD of W C is asked for with full factors, as the
authors' released code does (docs/method.md). Nothing is slowed on purpose: products are in
float32, the moments lie on the model's device, and a moment is freed once its module is solved.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Measured:
    """Sums over the samples, by module name."""

    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    moment: dict[str, Tensor] = field(default_factory=dict)


def initialise(
    model: nn.Module, samples: Sequence[Mapping[str, Tensor]], names: Sequence[str], r: int
) -> Any:
    """Calibrate, share ranks and scales out, solve and attach; return the PeftModel.

    Args:
        model: the base model.
        samples: batches of one sample, without padding.
        names: full names of the Linear modules to adapt.
        r: base rank, and base alpha.
    """
    measured = measure(model, samples, names)
    ranks = shared_ranks(measured.sensitivity, r)
    scales = shared_scales(measured.sensitivity, r)
    bases = {}
    for name in names:
        moment = measured.moment.pop(name)
        bases[name] = leading(model.get_submodule(name).weight, moment, ranks[name])
        del moment
    return attach(model, bases, scales, r)


def measure(
    model: nn.Module, samples: Sequence[Mapping[str, Tensor]], names: Sequence[str]
) -> Measured:
    """Run every sample forward and backward; return S and C of each module."""
    model.eval().requires_grad_(False)
    modules = {name: model.get_submodule(name) for name in names}
    for module in modules.values():
        module.weight.requires_grad_(True)
    measured = Measured()
    with _watched(modules, measured):
        for sample in samples:
            model.zero_grad(set_to_none=True)
            model(**sample).loss.backward()
            for name, module in modules.items():
                value = (module.weight.detach() * module.weight.grad).abs().mean() / len(samples)
                measured.sensitivity[name] = measured.sensitivity.get(name, 0) + value
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    for moment in measured.moment.values():
        moment.div_(len(samples))
    return measured


@contextlib.contextmanager
def _watched(modules: Mapping[str, nn.Module], measured: Measured) -> Iterator[None]:
    handles = [
        module.register_forward_hook(partial(_add_inputs, measured.moment, name))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_inputs(moments: dict[str, Tensor], name: str, _: nn.Module, args: Any, __: Any) -> None:
    x = args[0].detach().flatten(0, -2).float()
    x = x - x.mean(dim=0)
    moments[name] = moments[name] + x.T @ x if name in moments else x.T @ x


def leading(weight: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Return the leading right singular vectors of W C, from an SVD with full factors."""
    _, _, vectors = torch.linalg.svd(weight.detach().float() @ moment)
    return vectors[:rank].clone()


def shared_ranks(sensitivity: Mapping[str, Tensor], r: int) -> dict[str, int]:
    """r_i = round(N r S_i / sum S); what is missing or over goes to the largest, one by one."""
    values = {name: float(value) for name, value in sensitivity.items()}
    budget, total = len(values) * r, sum(values.values())
    ranks = {name: round(budget * value / total) for name, value in values.items()}
    while (missing := budget - sum(ranks.values())) != 0:
        largest = max(ranks, key=lambda name: ranks[name])
        ranks[largest] += 1 if missing > 0 else -1
    return ranks


def shared_scales(sensitivity: Mapping[str, Tensor], r: int) -> dict[str, float]:
    """s_i = max(r, round(N r S_i / sum S)) / r, with alpha = r."""
    total = sum(float(value) for value in sensitivity.values())
    budget = len(sensitivity) * r
    return {n: max(r, round(budget * float(s) / total)) / r for n, s in sensitivity.items()}


def attach(
    model: nn.Module, bases: Mapping[str, Tensor], scales: Mapping[str, float], r: int
) -> Any:
    """Attach LoRA by PEFT and overwrite its A."""
    from peft import LoraConfig, get_peft_model

    used = {name: basis for name, basis in bases.items() if len(basis)}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(used),
        rank_pattern={f"^{re.escape(name)}": len(basis) for name, basis in used.items()},
        alpha_pattern={f"^{re.escape(n)}": scales[n] * len(basis) for n, basis in used.items()},
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, basis in used.items():
            adapted.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(basis)
    return adapted
