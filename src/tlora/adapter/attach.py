"""Plan -> stock PEFT adapter: a LoraConfig with rank and alpha patterns, A set and frozen.

`target_parameters` adapts fused parameters of experts. On architectures whose dense layers have the
names that experts had before fusion (DeepSeek: gate_proj, up_proj, down_proj), it also adapts the
weights of these layers, since PEFT rewrites such names in `target_modules` to those of the fused
parameters. A parameter's adapter sits in a `ParamWrapper` around its module; several wrappers of
one module are nested.

PEFT creates an adapter on the device of the base weight. An offloaded weight is on `meta`, so the
adapter would have no values either. Here the adapter is allocated on the device that runs the
module and stays there: it is small, and it trains.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tlora.adapter.blocks import plan_in_blocks
from tlora.adapter.freeze import complete_heads, freeze_a, lora_layers
from tlora.adapter.plan import AdapterPlan
from tlora.adapter.planning import plan
from tlora.adapter.stock import patterns
from tlora.calibration.placement import device_of, loaded_by, refuse_wrapped
from tlora.calibration.preserve import keep_gradients
from tlora.calibration.probe import CalibrateOptions, calibrate
from tlora.calibration.targets import (
    check_config,
    find_targets,
    heads_of,
    namesakes,
    taken_for_experts,
)
from tlora.config import TLoraConfig
from tlora.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


def get_tlora_model(
    model: nn.Module,
    config: TLoraConfig,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    **reading: Unpack[CalibrateOptions],
) -> PeftModel:
    """Calibrate, plan and attach in one call; the PeftModel's output still equals the base model's.

    ``attach(model, plan(model, calibrate(model, batches, config), config))``, but within
    `memory_budget`; unless modules are streamed, the plan is the same up to rounding.

    Args:
        model: the base model; as with PEFT, its Linears are wrapped in place.
        config: the adapter's configuration.
        batches: calibration samples, read once; see `calibrate`.
        adapter_name: PEFT's name of the adapter.
        **reading: ``progress``, ``skip_bad_samples`` and ``cache``, as for `calibrate`.

    Raises:
        TLoraError: as `calibrate`, `plan` and `attach`; the model is then unchanged.
    """
    refuse_wrapped(model)
    return attach(model, made_plan(model, batches, config, **reading), adapter_name=adapter_name)


def made_plan(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    **reading: Unpack[CalibrateOptions],
) -> AdapterPlan:
    """Calibrate and plan in one go, or plan from a cached calibration."""
    check_config(config)
    if reading.get("cache") is None:
        return plan_in_blocks(model, batches, config, **reading)
    stats = calibrate(model, batches, config, **reading)
    return plan(model, stats, config, progress=reading.get("progress", True))


def attach(model: nn.Module, plan: AdapterPlan, *, adapter_name: str = "default") -> PeftModel:
    """Attach a plan's adapter to the base model as a stock PEFT LoRA, A frozen, B zero.

    The model's output stays bit-identical to the base model's, and the random state does not
    change. As with PEFT, ``model`` itself changes: its targeted Linears are wrapped in place.
    (bitsandbytes' 4-bit layers also lose a CPU inference kernel that blocks gradients.)

    Args:
        model: the base model the plan was made for.
        plan: from `plan` or `AdapterPlan.load`.
        adapter_name: PEFT's name of the adapter.

    Raises:
        AdapterError: the plan does not fit the model (every misfit is named), its 4-bit weights
            block gradients, a head that would train is offloaded, or an engine has already wrapped
            or sharded the model; nothing is changed.
    """
    from peft import get_peft_model

    refuse_wrapped(model)
    _check_fit(model, plan)
    refuse_offloaded_training(model, plan.config, plan.modules)
    keep_gradients(model)
    config = lora_config(plan, model)
    keys = parameter_keys(model, plan.modules)
    with torch.random.fork_rng(devices=[]), misleading_warnings_ignored():
        # On `meta`, since every value is written below; other trained modules start from the base's
        # values.
        adapted = get_peft_model(
            model,
            config,
            adapter_name=adapter_name,
            low_cpu_mem_usage=not (config.trainable_token_indices or config.modules_to_save),
        )
    complete_heads(adapted)
    make_room(adapted, adapter_name)
    with torch.no_grad():
        for name, module in plan.modules.items():
            if module.rank == 0:
                continue
            layer = adapter_layer(adapted.base_model.model, name, keys.get(name))
            layer.lora_A[adapter_name].weight.copy_(module.lora_A)
            layer.lora_B[adapter_name].weight.zero_()
    if plan.config.freeze_a:
        freeze_a(adapted, adapter_name)
    return adapted


@contextlib.contextmanager
def misleading_warnings_ignored() -> Iterator[None]:
    """Suppress pointless PEFT warnings while the body runs."""
    with warnings.catch_warnings():
        # PEFT sets fan_in_fan_out per module and warns if the config differs.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        # PEFT applies the patterns of parameters but searches only modules for their keys.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted")
        yield


def lora_config(plan: AdapterPlan, model: nn.Module) -> LoraConfig:
    """Return the stock LoraConfig of a plan.

    PEFT multiplies the adapter's output by alpha_pattern / rank_pattern, so
    alpha_pattern[i] = s_i r_i (docs/method.md, 5).
    """
    from peft import LoraConfig

    config = plan.config
    planned = {name: module for name, module in plan.modules.items() if module.rank > 0}
    keys = parameter_keys(model, planned)
    modules = [name for name in planned if name not in keys]
    used = {keys.get(name, name): module for name, module in planned.items()}
    alpha = config.lora_alpha
    ranks = {n: m.rank for n, m in used.items() if m.rank != config.r}
    alphas = {n: m.scale * m.rank for n, m in used.items() if m.scale * m.rank != alpha}
    return LoraConfig(
        r=config.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=modules,
        target_parameters=list(keys.values()) or None,
        exclude_modules=namesakes(model, modules),
        **patterns(ranks, alphas),
        lora_dropout=config.lora_dropout,
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        bias=config.bias,
        task_type=config.task_type,
        fan_in_fan_out=any(isinstance(model.get_submodule(n), Conv1D) for n in modules),
    )


def _check_fit(model: nn.Module, plan: AdapterPlan) -> None:
    targets = {target.adapter: target for target in find_targets(model, plan.config)}
    faults = []
    for name, module in plan.modules.items():
        if (target := targets.get(name)) is None:
            faults.append(f"{name} is planned but is not a target of this model")
            continue
        count = target.part.count if target.part else 1
        is_, planned = (
            f"{each[0]} x {each[1]}{f' of {each[2]} experts' if each[2] > 1 else ''}"
            for each in (
                (target.d_out, target.d_in, count),
                (module.d_out, module.d_in, module.experts),
            )
        )
        if is_ != planned:
            faults.append(f"{name} is {is_} but planned as {planned}")
        elif module.lora_A.shape != (count * module.rank, module.d_in):
            faults.append(f"{name} has a lora_A of shape {tuple(module.lora_A.shape)}")
    if not any(module.rank > 0 for module in plan.modules.values()):
        faults.append("no module has a rank above 0")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if faults[5:] else "")
        raise AdapterError(
            f"the plan does not fit this {type(model).__name__}: {shown}; plan for this model."
        )


def parameter_keys(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return the full name of the parameter that PEFT adapts as one unit, by planned name."""
    parameters = {name for name, _ in model.named_parameters()}
    keys = {name: name for name in names if name in parameters}
    taken = taken_for_experts(model, [name for name in names if name not in keys])
    return keys | {name: f"{name}.weight" for name in taken}


def adapter_layer(model: nn.Module, name: str, key: str | None) -> Any:
    """Return the LoRA layer of an adapted module, or of the parameter with the full name ``key``.

    ``key`` is None if the module itself is adapted.
    """
    if key is None:
        return model.get_submodule(name)
    owner, _, attribute = key.rpartition(".")
    layer: Any = model.get_submodule(owner)
    while layer.parameter_name != attribute:
        layer = layer.base_layer
    return layer


def refuse_offloaded_training(
    model: nn.Module, config: TLoraConfig, targets: Iterable[str]
) -> None:
    """Refuse to train an offloaded head or bias, which is dropped after each call.

    Raises:
        AdapterError: offloaded parameters of the base would train.
    """
    offloaded = loaded_by(model)
    if not offloaded:
        return
    heads = tuple(f".{name}." for name in heads_of(config))
    wrapped = tuple(f"{name}." for name in targets)
    biases = {"none": (), "all": ("",), "lora_only": wrapped}[config.bias]
    wrong = [
        name
        for name in sorted(offloaded)
        if any(head in f".{name}" for head in heads)
        or (name.endswith(".bias") and name.startswith(biases))
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise AdapterError(
            f"{wrong[0]}{more} would train in full but is offloaded, and offloaded "
            "weights are read-only; keep it on a device by the `device_map`, or "
            "attach the saved plan to a model that is loaded whole."
        )


def make_room(adapted: PeftModel, adapter_name: str) -> None:
    """Allocate adapter matrices that are on `meta` on the device that runs their module."""
    for _, layer in lora_layers(adapted, adapter_name):
        for matrix in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            if matrix.weight.is_meta:
                base = layer.get_base_layer()
                # As in PEFT: float32, or the base's dtype if that is wider.
                wide = getattr(getattr(base, "weight", None), "dtype", None) == torch.float64
                matrix.to_empty(device=device_of(base))
                matrix.to(torch.float64 if wide else torch.float32)
