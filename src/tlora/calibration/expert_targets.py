"""Which fused parameters of experts are adapted, by PEFT's `target_parameters`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from tlora.calibration.expert_layouts import ExpertPart, fused_parameters, why_not
from tlora.config import TLoraConfig
from tlora.errors import ConfigError, did_you_mean

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
