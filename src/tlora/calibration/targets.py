"""Which modules are adapted, by PEFT's own matching."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tlora.calibration.language_model import text_names
from tlora.calibration.names import linear_names, name_faults
from tlora.calibration.placement import is_dtensor, is_zero3, loaded_by
from tlora.calibration.weights import (
    DOWN,
    ExpertPart,
    Target,
    has_layout,
    holds_floats,
    inward_name,
    is_hqq_linear,
    part_shape,
)
from tlora.config import TLoraConfig
from tlora.errors import AdapterError, ConfigError, did_you_mean

# Heads that PEFT trains in full for these task types, and therefore never adapts.
_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def check_config(config: Any) -> None:
    """Refuse arguments in the wrong order, and fields set to a wrong value after construction.

    Raises:
        ConfigError: ``config`` is not a `TLoraConfig`, or has faults.
    """
    if not isinstance(config, TLoraConfig):
        raise ConfigError(
            f"the configuration is a {type(config).__name__}; give a TLoraConfig, after the "
            "model and the batches of `calibrate`, before the batches of `get_tlora_model`.",
            where="config",
        )
    if faults := config.faults():
        raise ConfigError(faults, where=config.where)


def find_targets(model: nn.Module, config: TLoraConfig) -> list[Target]:
    """Return what PEFT would adapt for ``config``: modules in the model's order, then experts.

    Each expert of a fused parameter is a target of its own.

    Raises:
        AdapterError: the model already has adapters.
        ConfigError: nothing matches (the existing Linear names are listed), a name or a layer index
            is not in the model, a matching module is neither a Linear nor a Conv1D, or a matching
            parameter is not an adaptable one of experts.
    """
    check_config(config)
    names = _matching_names(model, config)
    experts = list(_expert_targets(model, config.target_parameters or ()))
    faults = name_faults(model, config)
    if not names and not experts and not faults:
        faults = [_no_match_message(model, config)]
    if faults:
        raise ConfigError(faults, where="adapter")
    targets, wrong = [], []
    for name in names:
        module = model.get_submodule(name)
        if reason := _refused_by_peft(model, name):
            # PEFT's own "all-linear" includes them and then stops.
            if config.target_modules != "all-linear":
                wrong.append(reason)
        elif sizes := _sizes(module):
            targets.append(Target(name, module, *sizes))
        else:
            wrong.append(
                f"{name!r} is a {type(module).__name__}; task-aware LoRA adapts Linear and Conv1D "
                "modules: name these, or exclude it by `exclude_modules`."
            )
    if wrong:
        raise ConfigError(wrong, where="target_modules")
    if experts and any(isinstance(target.module, Conv1D) for target in targets):
        # One LoraConfig has one `fan_in_fan_out`, which PEFT refuses for parameters.
        raise ConfigError(
            "PEFT cannot adapt parameters together with Conv1D modules; remove one of the two.",
            where="target_parameters",
        )
    if fault := _without_module_adapter(model, targets, config):
        raise ConfigError(fault, where="target_modules")
    return targets + experts


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the modules whose names PEFT mistakes for names of fused experts.

    transformers 5 fused the former Linears gate_proj, up_proj and down_proj, and on these
    architectures PEFT maps such names in `target_modules` to the fused parameters
    (peft/utils/transformers_weight_conversion.py), even where a dense layer has them.
    """
    names = list(names)
    lost = {leaf for leaf in {name.rpartition(".")[2] for name in names} if _rewritten(model, leaf)}
    return [name for name in names if name.rpartition(".")[2] in lost]


def _rewritten(model: nn.Module, leaf: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    rule = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(rule, model, None)
    except ValueError:
        return True  # one of two names that were fused into one
    return leaf not in (rule.target_modules or ())


def _without_module_adapter(
    model: nn.Module, targets: list[Target], config: TLoraConfig
) -> str | None:
    """Report modules that PEFT can adapt neither as a module nor, as they are, as a parameter."""
    taken = set(taken_for_experts(model, [target.name for target in targets]))
    if config.lora_dropout:
        reason, left = "which does not work with `lora_dropout`: set it to 0", sorted(taken)
    else:
        reason = "which must be neither quantized nor offloaded: load the model that way"
        left = [t.name for t in targets if t.name in taken and not _has_plain_weight(t.module)]
    if not left:
        return None
    more = f" and {len(left) - 1} more" if left[1:] else ""
    return (
        f"{left[0]!r}{more}: on this architecture PEFT takes the name for that of fused "
        f"experts and adapts the module only through its weight, {reason}, or exclude it "
        "by `exclude_modules`."
    )


def _has_plain_weight(module: nn.Module) -> bool:
    return type(module) is nn.Linear and holds_floats(module) and not loaded_by(module)


def _refused_by_peft(model: nn.Module, name: str) -> str | None:
    """Return why PEFT does not adapt this module of this architecture (Mamba's out_proj)."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    kind = type(model.get_submodule(name))
    if issubclass(kind, nn.Linear) and kind.__name__.endswith("Router"):
        # Llama 4's module returns scores beside its product.
        return (
            f"{name!r} is a {kind.__name__}, which PEFT's LoRA does not run; exclude it by "
            "`exclude_modules`."
        )
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check:
            check(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError as reason:
        return str(reason)
    return None


def warn_of_second_names(model: nn.Module, targets: Iterable[Target], stacklevel: int) -> None:
    """Warn about targets that also have a second name, under which PEFT does not adapt them."""
    first = {name: id(module) for name, module in model.named_modules()}
    # An expert's target is a part of its module and has no module name.
    names = {id(t.module): t.name for t in targets if first.get(t.name) == id(t.module)}
    again = [
        f"{names[id(module)]} is also {name}"
        for name, module in model.named_modules(remove_duplicate=False)
        if names.get(id(module), name) != name
    ]
    if again:
        more = f" and {len(again) - 3} more" if again[3:] else ""
        warnings.warn(
            f"{'; '.join(again[:3])}{more}: a module with several names is calibrated on all "
            "its calls, but PEFT adapts only those under the first name; exclude it by "
            "`exclude_modules`.",
            stacklevel=stacklevel + 1,
        )


def heads_of(config: TLoraConfig) -> list[str]:
    """Return the names of the modules that train in full: the requested ones, and PEFT's heads."""
    return [*(config.modules_to_save or []), *_HEADS.get(config.task_type or "", [])]


def _sizes(module: Any) -> tuple[int, int] | None:
    """Return d_in and d_out of a linear map (not the shape of a packed weight), else None."""
    if isinstance(module, nn.Linear) or is_hqq_linear(module):
        return module.in_features, module.out_features
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
            f"{type(model).__name__} already has adapters; give the base model "
            "(`peft_model.unload()` returns it)."
        )
    wanted = config.target_modules
    if wanted == []:
        return []  # as in PEFT: parameters only
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
    # Matching by suffix, PEFT also finds modules that train in full (DistilBERT's pre_classifier).
    heads = tuple(rule.modules_to_save or ())
    found = [
        name
        for name, _ in model.named_modules()
        if name and not name.endswith(heads) and check_target_module_exists(rule, name)
    ]
    return text_names(model, config, found)


def _hqq_names(model: nn.Module) -> list[str]:
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    return [n for n, m in model.named_modules() if is_hqq_linear(m) and m is not head]


def _no_match_message(model: nn.Module, config: TLoraConfig) -> str:
    wanted, hint = config.target_modules, ""
    if isinstance(wanted, str) and wanted != "all-linear":
        hint = f" A string is a regex of full names; give names as a list: [{wanted}]."
    without = f" without {config.exclude_modules!r}" if config.exclude_modules else ""
    return (
        f"no module of {type(model).__name__} matches {wanted!r}{without};"
        f" {linear_names(model)}.{hint}"
    )


def namesakes(model: nn.Module, used: Collection[str]) -> str | None:
    """Return a regex of further modules that PEFT would adapt, since it takes a name for a suffix.

    ("inner.proj" for "proj"); None if there are none.
    """
    suffixes = tuple(f".{name}" for name in used)
    wrong = [n for n, _ in model.named_modules() if n not in used and n.endswith(suffixes)]
    return "|".join(map(re.escape, wrong)) or None


def fused_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, module and attribute of each 3-D parameter of experts, in the model's order."""
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{attribute}" if name else attribute
            if parameter.dim() == 3 and "expert" in f"{full} {type(module).__name__}".lower():
                yield full, module, attribute


def _why_not(module: Any, attribute: str) -> str | None:
    """Return why a fused parameter cannot be adapted, as the end of a sentence; None if it can."""
    kind = type(module).__name__
    if not has_layout(module):
        return f"{kind} does not declare the layout of its experts"
    if attribute not in (inward_name(module), DOWN):
        return f"it is not a projection of {kind}"
    parameter = module.get_parameter(attribute)
    plain = type(parameter.data) is Tensor and parameter.is_floating_point()
    spread = getattr(module, "_is_expert_parallel", False) or len(parameter) != module.num_experts
    reasons = {
        "it is sharded over processes: plan before sharding": is_dtensor(parameter)
        or is_zero3(parameter),
        "it is offloaded: keep it on a device by the `device_map`": attribute in loaded_by(module),
        f"it is stored as {parameter.dtype}: load the model with unquantized experts": (
            not plain or parameter.itemsize < 2
        ),
        "its experts are spread over processes: load the model without expert parallelism": spread,
        "PEFT cannot adapt a single transposed expert": (
            module.is_transposed and module.num_experts == 1
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _expert_targets(model: nn.Module, names: Sequence[str]) -> Iterator[Target]:
    """Yield each expert of the parameters that ``names`` match, in order.

    As in PEFT, a name matches a parameter with this full name, or one that ends in "." and it.

    Raises:
        ConfigError: a name matches nothing, or a parameter that cannot be adapted.
    """
    fused = list(fused_parameters(model))
    if faults := [fault for name in names if (fault := _fault(model, name, fused))]:
        raise ConfigError(faults, where="target_parameters")
    for full, module, attribute in fused:
        if any(_matches(name, full) for name in names):
            count = len(module.get_parameter(attribute))
            d_out, d_in = part_shape(module, attribute)
            for index in range(count):
                part = ExpertPart(full, attribute, index, count)
                yield Target(f"{full}[{index}]", module, d_in, d_out, part)


def _fault(model: nn.Module, name: str, fused: Sequence[tuple[str, nn.Module, str]]) -> str | None:
    mine = [each for each in fused if _matches(name, each[0])]
    for full, module, attribute in mine:
        if reason := _why_not(module, attribute):
            return f"{full!r} cannot be adapted: {reason}; remove it from `target_parameters`."
    if mine:
        return None
    short = _short([full for full, _, _ in fused])
    return (
        f"no fused parameter of experts in {type(model).__name__} matches {name!r}; they "
        f"are {', '.join(short) or '(none)'}, and `target_modules` adapts "
        f"Linears.{did_you_mean(name, short)}"
    )


def left_out(model: nn.Module, config: TLoraConfig) -> list[str]:
    """Return the names of the fused parameters that a configuration does not adapt."""
    names = config.target_parameters or ()
    fused = [full for full, _, _ in fused_parameters(model)]
    return [full for full in fused if not any(_matches(name, full) for name in names)]


def unadapted_experts(model: nn.Module, config: TLoraConfig) -> str:
    """List the fused parameters that stay unadapted, and how to adapt each or why not."""
    left = set(left_out(model, config))
    fused = [each for each in fused_parameters(model) if each[0] in left]
    reasons = {name: _why_not(module, attribute) for name, module, attribute in fused}
    says = [
        f"{type(model).__name__} keeps experts in fused parameters, which no Linear wraps "
        f"and which are not adapted: {', '.join(_short(list(reasons)))}."
    ]
    if able := [name for name, reason in reasons.items() if reason is None]:
        says.append(f"To adapt {len(able)} of them give target_parameters={_short(able)}.")
    unable = [f"Not possible for {name}: {reason}." for name, reason in reasons.items() if reason]
    return " ".join(says + unable[:3])


def warn_of_unadapted_experts(model: nn.Module, config: TLoraConfig, stacklevel: int) -> None:
    """Warn once about fused parameters that stay unadapted while all linear maps are requested.

    Experts are linear maps too. A user who names parameters or modules has made a choice.
    """
    asked = config.target_modules == "all-linear" and not config.target_parameters
    if asked and left_out(model, config):
        warnings.warn(unadapted_experts(model, config), stacklevel=stacklevel + 1)


def _matches(name: str, full: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _short(names: Sequence[str]) -> list[str]:
    """Return the last two parts of each name, which also match the same name in other layers."""
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
