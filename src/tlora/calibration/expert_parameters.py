"""Experts that share one 3-D parameter: which of them can be adapted, and what each class computes.

transformers 5 keeps the experts of a layer as E matrices in one parameter (Mixtral, Qwen-MoE,
OLMoE, DeepSeek, GPT-OSS, ...). Its decorator `use_experts_implementation` puts flags on the module
that say how: gate or none, biases, whether a matrix is stored as m x d or d x m, a norm behind the
experts. Only the flags are read here, never the name of a model. What expert e computes for a row x
(transformers/integrations/moe.py, `grouped_mm_experts_forward`)::

    u = W_in[e] x + b_in[e];  h = gate(u), or act(u);  y = norm(W_down[e] h + b_down[e])

Which of them are adapted is said by PEFT's `target_parameters`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tlora.calibration.placement import is_dtensor, is_zero3, loaded_by
from tlora.config import TLoraConfig
from tlora.errors import ConfigError, did_you_mean
from tlora.linalg.matrices import full_precision

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")

_DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertPart:
    """One expert's matrix in a fused parameter.

    Attributes:
        parameter: the parameter's full name in the model.
        attribute: its name in the module.
        index: of the expert.
        count: E, experts in the parameter.
    """

    parameter: str
    attribute: str
    index: int
    count: int

    @property
    def reads_hidden(self) -> bool:
        """Whether its input is the activated h, not the rows that the module is given."""
        return self.attribute == _DOWN


def has_layout(module: nn.Module) -> bool:
    """Return whether a module says how its fused experts are laid out."""
    return all(hasattr(module, flag) for flag in _FLAGS)


def fused_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, module and attribute of each 3-D parameter of experts, in the model's order."""
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{attribute}" if name else attribute
            if parameter.dim() == 3 and "expert" in f"{full} {type(module).__name__}".lower():
                yield full, module, attribute


def why_not(module: nn.Module, attribute: str) -> str | None:
    """Return why a fused parameter cannot be adapted, as the end of a sentence; None if it can."""
    kind = type(module).__name__
    if not has_layout(module):
        return f"{kind} does not say how its experts are laid out"
    layer: Any = module
    if attribute not in (_inward(module), _DOWN):
        return f"it is no projection of {kind}"
    parameter = layer.get_parameter(attribute)
    plain = type(parameter.data) is Tensor and parameter.is_floating_point()
    spread = getattr(layer, "_is_expert_parallel", False) or len(parameter) != layer.num_experts
    reasons = {
        "it is sharded over processes: plan before that": is_dtensor(parameter)
        or is_zero3(parameter),
        "it is offloaded: keep it on a device by the `device_map`": attribute in loaded_by(module),
        f"it is stored as {parameter.dtype}: load the model with unquantized experts": (
            not plain or parameter.itemsize < 2
        ),
        "its experts are spread over processes: load the model without expert parallelism": spread,
        "PEFT cannot adapt a single transposed expert": (
            layer.is_transposed and layer.num_experts == 1
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def part_shape(module: nn.Module, attribute: str) -> tuple[int, int]:
    """Return m and d of one expert's matrix."""
    layer: Any = module
    _, rows, columns = layer.get_parameter(attribute).shape
    return (columns, rows) if layer.is_transposed else (rows, columns)


def read_part(module: nn.Module, part: ExpertPart) -> Tensor:
    """Return one expert's matrix as m x d, a view of the parameter."""
    layer: Any = module
    matrix: Tensor = layer.get_parameter(part.attribute)[part.index]
    return matrix.T if layer.is_transposed else matrix


def inward(module: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """Return u of an expert for its rows, tokens x d."""
    return _linear(module, _inward(module), expert, rows)


def activated(module: nn.Module, inner: Tensor) -> Tensor:
    """Return h of u."""
    layer: Any = module
    hidden: Tensor = layer._apply_gate(inner) if layer.has_gate else layer.act_fn(inner)
    return hidden


def outward(module: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """Return W_down h + b_down of an expert, before the norm that some classes have."""
    return _linear(module, _DOWN, expert, hidden)


def normed(module: nn.Module, outer: Tensor) -> Tensor:
    """Return y of it."""
    layer: Any = module
    return layer.post_expert_norm(outer) if layer.has_post_expert_norm else outer


def _inward(module: nn.Module) -> str:
    layer: Any = module
    return "gate_up_proj" if layer.has_gate else "up_proj"


@full_precision
def _linear(module: nn.Module, attribute: str, expert: int, rows: Tensor) -> Tensor:
    layer: Any = module
    weight = layer.get_parameter(attribute)[expert]
    bias = layer.get_parameter(f"{attribute}_bias")[expert] if layer.has_bias else None
    # In the weight's dtype, as transformers' `grouped_mm`, which autocast leaves alone.
    return functional.linear(
        rows.to(weight.dtype), weight.T if layer.is_transposed else weight, bias
    )


_SHOWN = 3


def expert_parts(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, ExpertPart]]:
    """Yield module and part of each expert in the parameters that ``names`` match, in order.

    As in PEFT a name matches a parameter of this full name, or one that ends in "." and it.

    Raises:
        ConfigError: a name matches nothing, or a parameter that cannot be adapted.
    """
    fused = list(fused_parameters(model))
    faults = [fault for name in names if (fault := _fault(model, name, fused))]
    if faults:
        raise ConfigError(faults, where="target_parameters")
    for full, module, attribute in fused:
        if any(_matches(name, full) for name in names):
            count = len(module.get_parameter(attribute))
            for index in range(count):
                yield module, ExpertPart(full, attribute, index, count)


def fused_expert_parameters(model: nn.Module) -> list[str]:
    """Return the names of the 3-D parameters of experts, which no Linear wraps."""
    return [full for full, _, _ in fused_parameters(model)]


def left_out(model: nn.Module, config: TLoraConfig) -> list[str]:
    """Return the names of the fused parameters that a configuration does not adapt."""
    names = config.target_parameters or ()
    fused = fused_expert_parameters(model)
    return [full for full in fused if not any(_matches(name, full) for name in names)]


def unadapted_experts(model: nn.Module, config: TLoraConfig) -> str:
    """Say which fused parameters are left out, and which names adapt them or why nothing does."""
    left = set(left_out(model, config))
    fused = [each for each in fused_parameters(model) if each[0] in left]
    reasons = {full: why_not(module, attribute) for full, module, attribute in fused}
    able = [full for full, reason in reasons.items() if reason is None]
    says = [
        f"{type(model).__name__} keeps experts in fused parameters, which no Linear wraps and"
        f" which are not adapted: {_listed(list(reasons))}."
    ]
    if able:
        says.append(f"To adapt {len(able)} of them give target_parameters={_short(able)}.")
    for reason in dict.fromkeys(filter(None, reasons.values())):
        names = [full for full, each in reasons.items() if each == reason]
        says.append(f"Not possible for {_listed(names)}: {reason}.")
    return " ".join(says)


def warn_of_unadapted_experts(model: nn.Module, config: TLoraConfig, stacklevel: int) -> None:
    """Warn once of fused parameters that are left out where all linear maps are asked for.

    Experts are linear maps too. Who names parameters, or modules, has made a choice.
    """
    asked = config.target_modules == "all-linear" and not config.target_parameters
    if asked and left_out(model, config):
        warnings.warn(unadapted_experts(model, config), stacklevel=stacklevel + 1)


def _fault(model: nn.Module, name: str, fused: Sequence[tuple[str, nn.Module, str]]) -> str | None:
    mine = [each for each in fused if _matches(name, each[0])]
    for full, module, attribute in mine:
        if reason := why_not(module, attribute):
            return f"{full!r} cannot be adapted: {reason}; leave it out."
    if mine:
        return None
    if any(_matches(name, full) for full, _ in model.named_parameters()):
        return (
            f"{name!r} is no fused parameter of experts; adapt the weight of a Linear by"
            " `target_modules`."
        )
    short = _short([full for full, _, _ in fused])
    return (
        f"no parameter of {type(model).__name__} matches {name!r}; its fused parameters of experts"
        f" are {', '.join(short) or '(none)'}.{did_you_mean(name, short)}"
    )


def _matches(name: str, full: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _short(names: Sequence[str]) -> list[str]:
    """Return the last two parts of each name, which match it and its like in other layers."""
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
