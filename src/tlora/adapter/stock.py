"""Wraps a model by PEFT's own LoRA, with our choice of modules and our errors."""

from __future__ import annotations

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tlora.adapter.freeze import complete_heads
from tlora.calibration.language_model import log_unadapted_towers
from tlora.calibration.preserve import keep_gradients
from tlora.calibration.targets import (
    find_targets,
    fused_parameters,
    namesakes,
    taken_for_experts,
)
from tlora.calibration.weights import Target, holds_floats, is_8bit_linear, is_hqq_linear
from tlora.config import Basis, TLoraConfig
from tlora.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)

# Fields for choosing modules that the options records and TLoraConfig share.
_CHOOSING = ("target_modules", "exclude_modules", "modules_to_save", "task_type")
_LAYERS = ("layers_to_transform", "layers_pattern")

# PEFT matches every module against every key of both patterns, and Python caches 512 compiled
# regexes: beyond this number of keys, modules of equal value share one.
_KEYS_BEFORE_GROUPING = 450


def save_adapter(model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write an adapter as PEFT does, or the tensors in ``state`` instead of the model's.

    Trained rows are saved as rows; PEFT would also save the rest of a resized embedding.
    """
    config = model.peft_config["default"] if hasattr(model, "peft_config") else None
    rows = getattr(config, "trainable_token_indices", None) is not None
    more = {"save_embedding_layers": False} if rows else {}
    model.save_pretrained(folder, state_dict=state, **more)


def targets_of(model: nn.Module, options: Any) -> list[Target]:
    """Return the modules that an options record names, in the model's order, by PEFT's rules.

    Raises:
        ConfigError: nothing matches, or a match is neither a Linear nor a Conv1D.
        AdapterError: the model already has adapters.
    """
    if isinstance(options, TLoraConfig):
        return find_targets(model, options)
    chosen: dict[str, Any] = {n: getattr(options, n, None) for n in (*_CHOOSING, *_LAYERS)}
    return find_targets(model, TLoraConfig(**chosen))


def targets_named(model: nn.Module, names: Collection[str], options: Any) -> list[Target]:
    """Return all Linears and Conv1Ds whose name is, or ends in, one of ``names``."""
    chosen = TLoraConfig(modules_to_save=options.modules_to_save, task_type=options.task_type)
    suffixes = tuple(f".{name}" for name in names)
    return [t for t in find_targets(model, chosen) if f".{t.name}".endswith(suffixes)]


def wrap(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap the base model's modules in place, as `peft.get_peft_model` does.

    Raises:
        ConfigError: PEFT does not find the target modules, or cannot adapt them.
        AdapterError: the model's 4-bit weights block gradients.
    """
    import peft

    keep_gradients(model)
    try:
        with warnings.catch_warnings():
            # PEFT sets fan_in_fan_out per module and warns if the config differs.
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        # PEFT's message names the modules it did not find, or a limit of the adapter type.
        raise ConfigError(str(error), where="adapter") from error
    complete_heads(adapted)
    return adapted


def wrap_exactly(model: nn.Module, targets: Sequence[Target], config: Any) -> PeftModel:
    """Wrap exactly ``targets``, even if PEFT would match the names in ``config`` differently.

    Args:
        model: the base model.
        targets: its modules.
        config: PEFT's, of a type that adapts linear maps.

    Raises:
        ConfigError: as `exact` and `wrap`, or a target cannot be told from a module of the same
            name.
        AdapterError: as `wrap`.
    """
    if config.target_modules == "all-linear" and any(fused_parameters(model)):
        logger.warning(
            "%s keeps experts in fused parameters, which this method does not adapt; "
            "the method `tlora` does, by `target_parameters`.",
            type(model).__name__,
        )
    log_unadapted_towers(model, config)
    fields = exact(model, targets) | dict.fromkeys(_LAYERS)
    if fields["exclude_modules"] and not hasattr(config, "exclude_modules"):
        raise ConfigError(
            f"{type(config).__name__} has no `exclude_modules`, without which PEFT "
            f"would also adapt {fields['exclude_modules']}, whose name has the same "
            "ending; remove the target of that name.",
            where="target_modules",
        )
    if hasattr(config, "feedforward_modules"):
        fields["feedforward_modules"] = _feedforward(model, targets, config)
    for name, value in fields.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return wrap(model, config)


def _feedforward(model: nn.Module, targets: Sequence[Target], config: Any) -> list[str]:
    """Return the targets whose inputs IA3 scales, by full name like the targets."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as DEFAULTS

    wanted = config.feedforward_modules
    if wanted is None:
        wanted = DEFAULTS.get(getattr(getattr(model, "config", None), "model_type", None), [])
    if isinstance(wanted, str):
        return [target.name for target in targets if re.fullmatch(wanted, target.name)]
    ends = tuple(f".{name}" for name in wanted)
    return [target.name for target in targets if f".{target.name}".endswith(ends)]


def exact(model: nn.Module, targets: Sequence[Target]) -> dict[str, Any]:
    """Return the LoraConfig fields that choose exactly ``targets``, by full name.

    Raises:
        ConfigError: PEFT mistakes a name for that of experts.
    """
    names = [target.name for target in targets]
    refuse_taken(model, names)
    return {
        "target_modules": names,
        "exclude_modules": namesakes(model, set(names)),
        "fan_in_fan_out": any(isinstance(target.module, Conv1D) for target in targets),
    }


def patterns(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return `rank_pattern` and `alpha_pattern` of a LoraConfig, from values by full module name.

    The keys are anchored, because PEFT treats a bare name as a suffix.
    """
    grouped = len(ranks) + len(alphas) > _KEYS_BEFORE_GROUPING
    return {
        "rank_pattern": _pattern(ranks, grouped),
        "alpha_pattern": _pattern(alphas, grouped),
    }


def _pattern(values: Mapping[str, Any], grouped: bool) -> dict[str, Any]:
    if not grouped:
        return {f"^{re.escape(name)}": value for name, value in values.items()}
    names: dict[Any, list[str]] = defaultdict(list)
    for name, value in values.items():
        names[value].append(re.escape(name))
    return {f"^(?:{'|'.join(group)})": value for value, group in names.items()}


def refuse_taken(model: nn.Module, names: Sequence[str]) -> None:
    """Check that PEFT's LoRA mistakes no name for that of experts and adapts these instead.

    Raises:
        ConfigError: it does.
    """
    if taken := taken_for_experts(model, names):
        more = f" and {len(taken) - 1} more" if taken[1:] else ""
        leaves = sorted({name.rpartition(".")[2] for name in taken})
        raise ConfigError(
            f"{taken[0]!r}{more}: on this architecture PEFT takes the name for that "
            "of fused experts, and would adapt these instead; exclude them by "
            f"`exclude_modules` ({', '.join(leaves)}), or use the method `tlora`, "
            "which adapts them by their weights.",
            where="target_modules",
        )


def refuse_stored(targets: Sequence[Target], **reasons: str) -> None:
    """Check that no target is a layer of a library that a method cannot adapt.

    Args:
        targets: the modules.
        reasons: the reason for ``int8`` (bitsandbytes' 8-bit layers) and for ``hqq``.

    Raises:
        ConfigError: a target is such a layer.
    """
    forms = {"int8": (is_8bit_linear, "in 8 bits"), "hqq": (is_hqq_linear, "by HQQ")}
    for target in targets:
        for form, reason in reasons.items():
            holds, how = forms[form]
            if holds(target.module):
                raise ConfigError(
                    f"{target.name} is stored {how}, and {reason}; load the model in nf4 or"
                    " unquantized.",
                    where="method",
                )


def refuse_quantized(targets: Sequence[Target], reason: str) -> None:
    """Check that every target's weight is stored in floating point.

    Args:
        targets: the modules.
        reason: why the method needs that, as a clause.

    Raises:
        ConfigError: a weight is quantized.
    """
    if quantized := [target.name for target in targets if not holds_floats(target.module)]:
        raise ConfigError(
            f"{quantized[0]} is quantized, and {reason}; load the model unquantized.",
            where="method",
        )


def calibration_config(options: Any, basis: Basis = "weight-covariance") -> TLoraConfig:
    """Return a configuration that calibrates an options record's targets.

    It measures the statistics of ``basis`` and no sensitivities.
    """
    chosen = {name: getattr(options, name) for name in _CHOOSING}
    return TLoraConfig(**chosen, basis=basis, allocate_rank=False, allocate_scale=False)
