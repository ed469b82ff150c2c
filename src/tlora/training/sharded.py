"""`tlora train` under FSDP2: the model in parts from its files on, the results as of one process.

transformers reads each process's part of the base from the files, and the plan is made on it. The
plan is attached to the same model on `meta`, which is then sharded in the same way, so that it
takes the parts over as they are; no process ever holds more than its part and one gathered layer.
Of what trains the optimizer keeps parts as well.

Checkpoints and the adapter are gathered from the parts and have the form that one process gives
them, so any number of processes resumes them, sharded or not.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tlora.adapter.attach import adapter_layer
from tlora.calibration.group import process_group
from tlora.calibration.placement import is_dtensor, is_zero3, local_part
from tlora.errors import ConfigError
from tlora.methods.base import Plans
from tlora.models.skeleton import skeleton
from tlora.training.initialize import check_targets, prepare
from tlora.training.setup import pretrained

if TYPE_CHECKING:
    from tlora.adapter.plan import AdapterPlan
    from tlora.methods.base import Prepared
    from tlora.training.setup import Setup

_ADAPTER = "default"
_INSIDE = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.)")
"""What PEFT puts into the names of the base's parameters."""


def engine_of(arguments: Any) -> Callable[[Setup, Any, Any], Prepared] | None:
    """Return what loads and prepares a model in parts, as the engine asked for takes it.

    It takes the run, the device and the plan of a run that is resumed, as `initialize.adapt`.
    Without an engine that keeps weights in parts there is None.

    Raises:
        ConfigError: as `fsdp_of`.
    """
    from transformers.integrations import deepspeed

    if deepspeed.is_deepspeed_zero3_enabled():
        return adapt_zero3
    plugin = fsdp_of(arguments)
    return functools.partial(adapt, plugin=plugin) if plugin else None


def fsdp_of(arguments: Any) -> Any | None:
    """Return accelerate's FSDP plugin, as a field or `accelerate launch` asks for it; or None.

    From here on accelerate and the trainer do not know of it: the model that they get is sharded
    already. A launch of one process has nothing to shard.

    Raises:
        ConfigError: it asks for what a run cannot do.
    """
    if not (arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    # Each process reads its own part; transformers would let the first one read all.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    fields = (arguments.fsdp_plugin_args or {}) | {"cpu_ram_efficient_loading": False}
    if str(fields.get("fsdp_version") or os.environ.get("FSDP_VERSION")) != "2":
        raise ConfigError(
            "FSDP is asked for in its first version; set `fsdp_version: 2`.", "trainer"
        )
    plugin = FullyShardedDataParallelPlugin(**fields)
    if faults := list(_faults(plugin)):
        raise ConfigError(faults, where="trainer")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    arguments.fsdp = arguments.fsdp_plugin_args = None
    return plugin if process_group().size > 1 else None


def _faults(plugin: Any) -> Iterator[str]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        DistributedConfig = object
    if "fsdp_size" not in inspect.signature(DistributedConfig).parameters:
        yield "FSDP2 needs a transformers that shards a model as it loads; install 5.20 or later."
    if plugin.activation_checkpointing:
        yield (
            "`fsdp_activation_checkpointing` is not supported; leave it out and give"
            " --trainer.gradient_checkpointing true."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        yield "`fsdp_offload_params` is not supported; leave it out and use more processes."


def adapt(setup: Setup, device: Any, plan: Any, *, plugin: Any) -> Prepared:
    """Load the base in parts, plan on it if there is no ``plan``, and attach and shard.

    Args:
        setup: the run.
        device: of this process.
        plan: the `AdapterPlan` of a run that is resumed, or None.
        plugin: from `fsdp_of`.

    Raises:
        ConfigError: the run asks for what is not done in parts, or as `check_targets`.
    """
    model, layers = _outline(setup, plugin)
    base = setup.load_model(device, shards=layers)
    plan = plan or _planned_on(base, setup)
    setup.complete(model)
    model.generation_config = copy.deepcopy(base.generation_config)
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    prepared = prepare(setup, model, plan)
    shard(prepared.model, layers, base, plugin)
    adopt(prepared.model, base, plan)
    return prepared


def adapt_zero3(setup: Setup, device: Any, plan: Any) -> Prepared:
    """Plan on a base that FSDP2 shards, then attach to one that ZeRO-3 partitions as it loads.

    Arguments and errors as of `adapt`.
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
            plan = _planned_on(setup.load_model(device, shards=layers), setup)
        finally:
            deepspeed.set_hf_deepspeed_config(config)
    return prepare(setup, setup.load_model(device), plan)


def _outline(setup: Setup, plugin: Any) -> tuple[Any, list[str]]:
    """Return the base on `meta`, and the names of the layers to gather one at a time.

    Raises:
        ConfigError: the run asks for what is not done in parts, or there are no such layers.
    """
    if faults := list(_unsharded(setup)):
        raise ConfigError(faults, where="trainer")
    model = skeleton(pretrained(setup.config), setup.kind.task_type)
    return model, _layers(model, plugin)


def _planned_on(base: Any, setup: Setup) -> AdapterPlan:
    check_targets(setup.kind, setup.options, base)
    method: Any = setup.method
    return method.plan(base, setup.options, setup.calibration_batches())


def _unsharded(setup: Setup) -> Iterator[str]:
    """Yield a sentence for each thing that a run in parts cannot do."""
    config = setup.config
    if not isinstance(setup.method, Plans) or config.continue_from:
        what = "continue_from" if config.continue_from else f"the method {config.method!r}"
        yield f"under FSDP2 {what} is not supported; launch the run with DDP."
    if setup.kind.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        yield "a new head cannot be made under FSDP2; launch a classifier's run with DDP."
    if config.quantization != "none":
        yield "a quantized model cannot be sharded; leave `quantization` out, or launch with DDP."
    if config.tokens.add or getattr(setup.options, "trainable_token_indices", None):
        yield "single rows of an embedding cannot train under FSDP2; launch the run with DDP."


def _layers(model: nn.Module, plugin: Any) -> list[str]:
    """Return the names of the modules that are gathered one at a time."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    plugin.set_auto_wrap_policy(model)
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
    names = [name for name, module in model.named_modules() if name and chosen and chosen(module)]
    if not names:
        raise ConfigError(
            f"FSDP2 finds no layers of {type(model).__name__} to gather one at a time; set"
            " `fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`, and"
            " `fsdp_transformer_layer_cls_to_wrap` to the class of its layers.",
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
    # Every process has to write a reply as long as the longest.
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
                # A copy that trains must not share the frozen original's memory.
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


def like(old: Any, whole: Tensor) -> Tensor:
    """Return ``whole``, which every process has, in parts if ``old`` is, in its dtype."""
    from torch.distributed.tensor import distribute_tensor

    if not is_dtensor(old):
        return whole.to(old.device, old.dtype)
    whole = whole.to(old.device_mesh.device_type, old.dtype)
    return distribute_tensor(whole, old.device_mesh, old.placements, src_data_rank=None)


def gathered(value: Any) -> Any:
    """Return a tensor whole, on the CPU, or what is none as it is; every process has to call it."""
    if is_zero3(value):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().cpu().clone()
    if is_dtensor(value):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def fit_trainer(trainer: Any) -> None:
    """Let a trainer take a sharded model as it is, with checkpoints as of one process.

    Its own way would wrap the model by DDP, and write what its process holds. DeepSpeed's engine
    keeps its own checkpoints beside the adapter.
    """
    arguments, optimizer_file, scheduler_file = trainer.args, "optimizer.pt", "scheduler.pt"
    accelerator = trainer.accelerator

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = adapter_state(trainer.model)
        if arguments.should_save:
            trainer._save(output_dir or arguments.output_dir, state_dict=state)

    def save_optimizer(output_dir: str) -> None:
        state = optimizer_state(trainer.optimizer)
        if arguments.should_save:
            torch.save(state, Path(output_dir) / optimizer_file)
            torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / scheduler_file)

    def load(checkpoint: str, model: Any = None) -> None:
        load_adapter_state(trainer.model, Path(checkpoint))

    def load_best() -> None:
        load(trainer.state.best_model_checkpoint)

    def load_optimizer(checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
        load_optimizer_state(trainer.optimizer, read(Path(checkpoint) / optimizer_file))
        trainer.lr_scheduler.load_state_dict(read(Path(checkpoint) / scheduler_file))

    trainer.save_model = save_model
    if trainer.is_deepspeed_enabled:
        return
    # Which leaves autocast, and neither moves nor wraps the model.
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
    trainer._save_optimizer_and_scheduler = save_optimizer
    trainer._load_from_checkpoint = load
    trainer._load_best_model = load_best
    trainer._load_optimizer_and_scheduler = load_optimizer


def gather(prepared: Prepared) -> None:
    """Gather the adapter, which every process has to do, for the one that saves it."""
    state = adapter_state(prepared.model)
    model: Any = prepared.model
    prepared.writer = lambda folder: model.save_pretrained(folder, state_dict=state)


def _saved_names(model: Any) -> dict[str, str]:
    """Return the full names of what PEFT saves of a model, by their names in the file."""
    from peft import get_peft_model_state_dict

    # PEFT only chooses among the names, so that it takes anything for the tensors.
    names = {name: name for name in model.state_dict()}
    return get_peft_model_state_dict(model, names, _ADAPTER, save_embedding_layers=False)


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Gather what PEFT saves of a sharded model; every process has to call it."""
    state = dict(model.named_parameters(remove_duplicate=False))
    return {name: gathered(state[name]) for name in _saved_names(model).values()}


def load_adapter_state(model: Any, folder: Path) -> None:
    """Give a sharded model the adapter in a ``folder``, in place."""
    from safetensors.torch import load_file

    saved, state = load_file(folder / "adapter_model.safetensors"), model.state_dict()
    for short, name in _saved_names(model).items():
        _copy(state[name], saved[short])


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Gather an optimizer's state; every process has to call it."""
    state = optimizer.state_dict()
    whole = {
        index: {name: gathered(value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {"state": whole, "param_groups": state["param_groups"]}


def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give an optimizer of sharded parameters a whole state, in parts."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]

    def part(old: Tensor, value: Tensor) -> Tensor:
        # Moments have the parameter's shape; what counts steps is a number.
        return like(old, value) if value.shape == old.shape else value

    state = {
        index: {name: part(parameters[index], value) for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _copy(target: Any, whole: Tensor) -> None:
    with torch.no_grad():
        local_part(target).copy_(local_part(like(target, whole)))
