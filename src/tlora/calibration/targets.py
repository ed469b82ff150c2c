"""Which modules are adapted, by PEFT's own matching."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tlora.calibration.weights import is_hqq_linear
from tlora.config import TLoraConfig
from tlora.errors import AdapterError, ConfigError, did_you_mean

# Heads that PEFT trains in full for these task types, and so never adapts.
_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


@dataclass(frozen=True)
class Target:
    """One module to adapt: y = W x + b with W of d_out x d_in (m x d)."""

    name: str
    module: nn.Module
    d_in: int
    d_out: int


def find_targets(model: nn.Module, config: TLoraConfig) -> list[Target]:
    """Return the modules that PEFT would adapt for ``config``, in the model's order.

    Raises:
        AdapterError: the model already carries adapters.
        ConfigError: nothing matches (the Linear names that exist are listed), or a module
            matches that is no Linear and no Conv1D.
    """
    names = _matching_names(model, config)
    if not names:
        raise ConfigError(_nothing_matches(model, config), where="target_modules")
    targets, wrong = [], []
    for name in names:
        module = model.get_submodule(name)
        if sizes := _sizes(module):
            targets.append(Target(name, module, *sizes))
        else:
            wrong.append(
                f"{name!r} is a {type(module).__name__}; task-aware LoRA adapts Linear and Conv1D"
                " modules: name these, or leave it out by `exclude_modules`."
            )
    if wrong:
        raise ConfigError(wrong, where="target_modules")
    return targets


def heads_of(config: TLoraConfig) -> list[str]:
    """Return the names of the modules that train in full: those asked for, and PEFT's own heads."""
    return [*(config.modules_to_save or []), *_HEADS.get(config.task_type or "", [])]


def fused_expert_parameters(model: nn.Module) -> list[str]:
    """Return the names of 3-D expert parameters, which no Linear wraps and so nothing adapts."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name
    ]


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return d_in and d_out of a linear map (not what a packed weight measures), else None."""
    if isinstance(module, nn.Linear) or is_hqq_linear(module):
        layer: Any = module
        return layer.in_features, layer.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _matching_names(model: nn.Module, config: TLoraConfig) -> list[str]:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import (
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            f"{type(model).__name__} already carries adapters; give the base model"
            " (`peft_model.unload()` returns it)."
        )
    wanted = config.target_modules
    if wanted is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULTS:
            raise ConfigError(
                f"PEFT has no default for the architecture {kind!r}; name the modules, or give"
                ' "all-linear".',
                where="target_modules",
            )
        wanted = list(DEFAULTS[kind])
    rule = LoraConfig(
        target_modules=wanted,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=heads_of(config),
        task_type=config.task_type,
    )
    _maybe_include_all_linear_layers(rule, model)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        # PEFT adapts HQQ's layers but does not count them among all linear ones.
        rule.target_modules = {*rule.target_modules, *_hqq_names(model)}
    return [n for n, _ in model.named_modules() if n and check_target_module_exists(rule, n)]


def _hqq_names(model: nn.Module) -> list[str]:
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    return [n for n, m in model.named_modules() if is_hqq_linear(m) and m is not head]


def _nothing_matches(model: nn.Module, config: TLoraConfig) -> str:
    linear = [n for n, m in model.named_modules() if _sizes(m)]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    wanted = config.target_modules
    asked: Iterable[str] = wanted if isinstance(wanted, list) else [str(wanted)]
    hint = "".join(did_you_mean(name, suffixes) for name in asked)
    return (
        f"no module of {type(model).__name__} matches {wanted!r}"
        f"{f' without {config.exclude_modules!r}' if config.exclude_modules else ''}; its Linear"
        f" and Conv1D modules are named {', '.join(suffixes) or '(none)'}.{hint}"
    )
