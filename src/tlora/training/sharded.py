"""`tlora train` under FSDP2 and ZeRO-3: the model is sharded while loading.

transformers reads each process's part of the base from the files, and the plan is made on it. The
plan is attached to the same model on `meta`, which is then sharded in the same way, so that it
takes over the parts unchanged. No process ever holds more than its parts, the running layer, and
the modules outside the layers (embeddings, head). The optimizer state is sharded as well.

ZeRO-3 partitions a model while loading; before that, the plan is made on a model sharded by FSDP2.
`tlora.training.gathering` gathers trainable parameters.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tlora.adapter.attach import adapter_layer, parameter_keys
from tlora.calibration.group import process_group
from tlora.errors import ConfigError, first_line
from tlora.methods.base import Plans
from tlora.models.pretrained import set_token_ids
from tlora.models.skeleton import skeleton
from tlora.training.gathering import like
from tlora.training.initialize import check_targets, prepare
from tlora.training.setup import pretrained

if TYPE_CHECKING:
    from tlora.adapter.plan import AdapterPlan
    from tlora.methods.base import Prepared
    from tlora.training.setup import Setup

_ADAPTER = "default"
_INSIDE = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.)")
"""PEFT's infix in the names of the base's parameters."""


def engine_of(arguments: Any) -> Callable[[Setup, Any, Any], Prepared] | None:
    """Return the function that loads and prepares a sharded model for the requested engine.

    It takes the run, the device and the plan of a resumed run, as `initialize.adapt` does. None if
    no engine shards the weights.

    Raises:
        ConfigError: as `fsdp_of`.
    """
    from transformers.integrations import deepspeed

    if deepspeed.is_deepspeed_zero3_enabled():
        return adapt_zero3
    plugin = fsdp_of(arguments)
    return functools.partial(adapt, plugin=plugin) if plugin else None


def fsdp_of(arguments: Any) -> Any | None:
    """Return accelerate's FSDP plugin, if a field or `accelerate launch` requests it; else None.

    From here on it is hidden from accelerate and the trainer: their model is already
    sharded. A launch of one process has nothing to shard.

    Raises:
        ConfigError: it requests something that a run does not support.
    """
    if not (arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    # Each process reads its own part; transformers would let the first one read all.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    fields = (arguments.fsdp_plugin_args or {}) | {"cpu_ram_efficient_loading": False}
    if str(fields.get("fsdp_version") or os.environ.get("FSDP_VERSION")) != "2":
        raise ConfigError("FSDP1 is requested; set `fsdp_version: 2`.", "trainer")
    with _refused():
        plugin = FullyShardedDataParallelPlugin(**fields)
    several = process_group().size > 1
    if faults := [*_faults(plugin), *(_optimizer_faults(arguments) if several else ())]:
        raise ConfigError(faults, where="trainer")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    arguments.fsdp = arguments.fsdp_plugin_args = None
    return plugin if several else None


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Turn accelerate's error about an FSDP setting into a ConfigError."""
    try:
        yield
    except (ValueError, LookupError) as error:
        raise ConfigError(
            f"accelerate refuses the FSDP settings: {first_line(error)}", "trainer"
        ) from error


def _faults(plugin: Any) -> Iterator[str]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        DistributedConfig = object
    if "fsdp_size" not in inspect.signature(DistributedConfig).parameters:
        yield "FSDP2 needs a transformers that shards a model as it loads; install 5.23 or later."
    if plugin.activation_checkpointing:
        yield (
            "`fsdp_activation_checkpointing` is not supported; remove it and give "
            "--trainer.gradient_checkpointing true."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        yield "`fsdp_offload_params` is not supported; remove it and use more processes."


def _optimizer_faults(arguments: Any) -> Iterator[str]:
    """Step the optimizer on a sharded parameter; some packages' optimizers cannot."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from transformers import Trainer

    mesh = init_device_mesh(arguments.device.type, (torch.distributed.get_world_size(),))
    part = DTensor.from_local(torch.zeros(64, 64, device=arguments.device), mesh, [Shard(0)])
    parameter = nn.Parameter(part)
    parameter.grad = torch.zeros_like(part)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, None)
        kind([parameter], **options).step()
    except Exception as error:  # an optimizer's library may raise anything
        yield (
            f"`optim` {str(arguments.optim.value)!r} does not train parameters that "
            f"FSDP2 shards ({first_line(error).rstrip('.!')}); choose another "
            "optimizer, or launch the run with DDP."
        )


def adapt(setup: Setup, device: Any, plan: Any, *, plugin: Any) -> Prepared:
    """Load the sharded base, plan on it if there is no ``plan``, and attach and shard.

    Args:
        setup: the run.
        device: of this process.
        plan: the `AdapterPlan` of a resumed run, or None.
        plugin: from `fsdp_of`.

    Raises:
        ConfigError: the run requests something that sharding does not support, or as
            `check_targets`.
    """
    model, layers = _outline(setup, plugin)
    base = setup.load_model(device, layers)
    plan = plan or _planned_on(base, setup)
    set_token_ids(model.config, ["pad_token_id"], setup.tokenizer.pad_token_id)
    model.generation_config = copy.deepcopy(base.generation_config)
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    prepared = prepare(setup, model, plan)
    shard(prepared.model, layers, base, plugin)
    adopt(prepared.model, base, plan)
    return prepared


def adapt_zero3(setup: Setup, device: Any, plan: Any) -> Prepared:
    """Plan on a base that FSDP2 shards, then attach to one that ZeRO-3 partitions while loading.

    Arguments and errors as for `adapt`.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers.integrations import deepspeed

    if plan is None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        config = deepspeed._hf_deepspeed_config_weak_ref()
        deepspeed.unset_hf_deepspeed_config()
        try:
            _, layers = _outline(setup, plugin)
            shards = layers if process_group().size > 1 else ()
            plan = _planned_on(setup.load_model(device, shards), setup)
        finally:
            deepspeed.set_hf_deepspeed_config(config)
    return prepare(setup, setup.load_model(device), plan)


def _outline(setup: Setup, plugin: Any) -> tuple[Any, list[str]]:
    """Return the base on `meta`, and the names of the layers to gather one at a time.

    Raises:
        ConfigError: the run requests something that sharding does not support, or there are no such
            layers.
    """
    if faults := list(_unsharded(setup)):
        raise ConfigError(faults, where="trainer")
    model = skeleton(pretrained(setup.config), setup.kind.task_type)
    return model, _layers(model, plugin)


def _planned_on(base: Any, setup: Setup) -> AdapterPlan:
    check_targets(setup.kind, setup.options, base)
    method: Any = setup.method
    plan: AdapterPlan = method.plan(base, setup.options, setup.calibration_batches())
    if fused := parameter_keys(base, plan.modules):
        raise ConfigError(
            f"{next(iter(fused))!r} is adapted as a parameter, which sharding does "
            "not support; launch the run with DDP, or remove it from "
            "`target_parameters`.",
            where="adapter",
        )
    return plan


def _unsharded(setup: Setup) -> Iterator[str]:
    """Yield a sentence for each unsupported feature of a sharded run."""
    config = setup.config
    what = []
    if not isinstance(setup.method, Plans):
        what.append(f"the method {config.method!r}")
    if config.continue_from:
        what.append("`continue_from`")
    if setup.kind.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        what.append("a classifier's new head")
    if config.quantization != "none":
        what.append("`quantization`")
    if config.tokens.add or getattr(setup.options, "trainable_token_indices", None):
        what.append("training single rows of an embedding")
    for each in what:
        yield f"{each} is not supported under FSDP2 and ZeRO-3; launch the run with DDP or ZeRO-2."


def _layers(model: nn.Module, plugin: Any) -> list[str]:
    """Return the names of the modules that are gathered one at a time."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    with _refused():
        plugin.set_auto_wrap_policy(model)
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
    names = [name for name, module in model.named_modules() if name and chosen and chosen(module)]
    if not names:
        raise ConfigError(
            f"FSDP2 finds no layers of {type(model).__name__} to gather one at a "
            "time; set `fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`, and "
            "`fsdp_transformer_layer_cls_to_wrap` to the class of its layers.",
            where="trainer",
        )
    return names


def shard(model: Any, layers: list[str], base: Any, plugin: Any) -> None:
    """Shard a PEFT model on `meta` over the mesh of its ``base``: each layer, then the rest."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = next(base.parameters()).device_mesh
    bare = model.get_base_model()
    for name in layers:
        layer = bare.get_submodule(name)
        fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    # Every process must generate replies as long as the longest.
    register_fsdp_forward_method(model, "generate")
    bare._is_fsdp_managed_module = True


def adopt(model: Any, base: nn.Module, plan: AdapterPlan) -> None:
    """Give a sharded PEFT model the parts of its ``base`` and the values of ``plan``, in place."""
    parts = base.state_dict()
    values = _planned(model, plan)
    with torch.no_grad():
        state = {}
        for key, old in model.state_dict().items():
            whole = values.get(key)
            if whole is None:
                name = _INSIDE.sub("", key.removeprefix("base_model.model."))
                part = parts[name].to(old.dtype)
                # A trainable copy must not share the frozen original's memory.
                state[key] = part.clone() if ".modules_to_save." in key else part
            else:
                state[key] = like(old, whole)
        model.load_state_dict(state, assign=True)
    bare = model.get_base_model()
    for name, buffer in base.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if bare.get_submodule(owner)._buffers[leaf].is_meta:
            bare.get_submodule(owner)._buffers[leaf] = buffer
    bare.tie_weights()


def _planned(model: Any, plan: AdapterPlan) -> dict[str, Tensor]:
    """Return A and B of every module by their names in the state of ``model``."""
    names = {id(module): name for name, module in model.named_modules()}
    values = {}
    for name, module in plan.modules.items():
        if module.rank == 0:
            continue
        layer = adapter_layer(model.base_model.model, name, None)
        a, b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        values[f"{names[id(a)]}.weight"] = module.lora_A
        values[f"{names[id(b)]}.weight"] = torch.zeros(b.weight.shape)
    return values
