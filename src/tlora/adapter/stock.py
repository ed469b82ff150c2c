"""Wrapping a model by PEFT's own LoRA, with our choice of modules and our errors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tlora.calibration.cpu_kernels import keep_gradients
from tlora.calibration.targets import Target, find_targets
from tlora.calibration.weights import is_8bit_linear
from tlora.config import TLoraConfig
from tlora.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# What the options records and TLoraConfig share of how modules are chosen.
_CHOOSING = ("target_modules", "exclude_modules", "modules_to_save", "task_type")


def targets_of(model: nn.Module, options: Any) -> list[Target]:
    """Return the modules that an options record names, in the model's order, by PEFT's rules.

    Raises:
        ConfigError: nothing matches, or something that is no Linear and no Conv1D.
        AdapterError: the model carries adapters already.
    """
    chosen = {name: getattr(options, name) for name in _CHOOSING}
    return find_targets(model, TLoraConfig(**chosen))


def targets_named(model: nn.Module, names: Collection[str], options: Any) -> list[Target]:
    """Return those of all Linears and Conv1Ds whose name is, or ends in, one of ``names``."""
    chosen = TLoraConfig(modules_to_save=options.modules_to_save, task_type=options.task_type)
    suffixes = tuple(f".{name}" for name in names)
    return [t for t in find_targets(model, chosen) if f".{t.name}".endswith(suffixes)]


def wrap(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap the base model's modules in place, as `peft.get_peft_model` does.

    Raises:
        ConfigError: PEFT does not find the target modules, or cannot adapt them.
        AdapterError: no gradient passes the model's 4-bit weights any more.
    """
    import peft

    keep_gradients(model)
    try:
        with warnings.catch_warnings():
            # PEFT decides fan_in_fan_out per module and warns where the config said otherwise.
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            return peft.get_peft_model(model, config)
    except ValueError as error:
        # PEFT names the modules it did not find.
        raise ConfigError(str(error), where="adapter") from error


def exact(model: nn.Module, targets: Sequence[Target]) -> dict[str, Any]:
    """Return the fields of a LoraConfig that choose exactly ``targets``, by their full names."""
    names = [target.name for target in targets]
    return {
        "target_modules": names,
        "exclude_modules": namesakes(model, set(names)),
        "fan_in_fan_out": any(isinstance(target.module, Conv1D) for target in targets),
    }


def namesakes(model: nn.Module, used: Collection[str]) -> str | None:
    """Return a regex of the modules that PEFT would adapt too, since it takes a name for a suffix.

    ("inner.proj" for "proj"); None where there are none.
    """
    suffixes = tuple(f".{name}" for name in used)
    wrong = [n for n, _ in model.named_modules() if n not in used and n.endswith(suffixes)]
    return "|".join(map(re.escape, wrong)) or None


def refuse_8bit(model: nn.Module, options: Any, reason: str) -> None:
    """Check that no target is one of bitsandbytes' 8-bit layers.

    Raises:
        ConfigError: one is; ``reason`` says why that cannot be.
    """
    for target in targets_of(model, options):
        if is_8bit_linear(target.module):
            raise ConfigError(
                f"{target.name} is stored in 8 bits, and {reason}; load the model in nf4 or"
                " unquantised.",
                where="method",
            )


def rows_and_columns(targets: Sequence[Target]) -> int:
    """Return sum_i (m_i + d_i): what one rank of A and B costs over all ``targets``."""
    return sum(target.d_out + target.d_in for target in targets)


def numbers_in(model: nn.Module) -> int:
    """Return how many numbers the parameters of a model hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def stored_as_floats(module: nn.Module) -> bool:
    """Return whether a module's weight is a plain tensor of floats that can be written to."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and type(weight.data) is torch.Tensor
        and weight.dtype.is_floating_point
    )


def forward_only(options: Any) -> TLoraConfig:
    """Return a configuration that calibrates an options record's targets by forward passes."""
    chosen = {name: getattr(options, name) for name in _CHOOSING}
    return TLoraConfig(**chosen, allocate_rank=False, allocate_scale=False)
