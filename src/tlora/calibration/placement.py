"""Placement of a model's weights: inside an engine, sharded over processes, offloaded.

FSDP2 (`fully_shard`) and DeepSpeed's ZeRO-3 split every parameter over the processes and gather a
layer's parameters while it runs, so all processes must run the same passes. Engines are recognized
by class names, so none is imported here.

accelerate keeps an offloaded parameter on `meta` between calls. Its hook on the module
(AlignDevicesHook) loads it before a call and drops it afterwards. That bounds a forward pass but
not a backward pass: autograd keeps each Linear's weight for the gradient of its input, so after a
forward pass it holds all of them. Here autograd stores a reference instead of an offloaded weight,
and the backward pass loads the weight again. Models without offloaded parameters are unaffected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlora.errors import AdapterError, CalibrationError

_WRAPPERS = {
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "OptimizedModule"): "_orig_mod",
    ("deepspeed", "DeepSpeedEngine"): "module",
}


def is_a(thing: Any, library: str, name: str) -> bool:
    """Return whether ``thing`` has a class ``name`` of ``library`` among its bases."""
    return any(
        kind.__name__ == name and kind.__module__.partition(".")[0] == library
        for kind in type(thing).__mro__
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the base model inside DDP, a DeepSpeed engine or torch.compile, with its own names.

    Raises:
        CalibrationError: it is wrapped by FSDP1, which keeps no single weights.
    """
    if is_a(model, "torch", "FullyShardedDataParallel"):
        raise CalibrationError(
            "the model is wrapped by FullyShardedDataParallel, which flattens weights together;"
            " shard it by torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate)."
        )
    for (library, name), inside in _WRAPPERS.items():
        if is_a(model, library, name):
            return unwrapped(getattr(model, inside))
    return model


def refuse_wrapped(model: nn.Module) -> None:
    """Check that an adapter can still be attached.

    PEFT could attach it, but the engine would neither shard nor synchronize the new parameters.

    Raises:
        AdapterError: the model is already in an engine.
    """
    fsdp = any(map(_is_fsdp, model.modules()))
    if fsdp or any(is_a(model, *wrapper) for wrapper in _WRAPPERS):
        how = "sharded by fully_shard" if fsdp else f"wrapped by {type(model).__name__}"
        raise AdapterError(
            f"the model is {how}, which would not train an adapter attached now; attach it "
            "before (a plan made from the sharded model fits the plain one)."
        )


def class_name(model: nn.Module) -> str:
    """Return the name of a model's own class, without the prefix of `fully_shard`."""
    kinds = type(model).__mro__
    own = [k for k in kinds if not any(base.__name__ == "FSDPModule" for base in k.__mro__)]
    return own[0].__name__


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model's weights are split over processes."""
    return any(map(_is_fsdp, model.modules())) or any(map(_is_split, model.parameters()))


def by_deepspeed(arguments: Any) -> bool:
    """Return whether DeepSpeed trains, according to transformers' training arguments."""
    return any(getattr(arguments, name, None) for name in ("deepspeed", "deepspeed_plugin"))


def is_whole(weight: Any) -> bool:
    """Return whether this process can read a weight without the others."""
    if is_zero3(weight):
        return bool(weight.ds_status.name == "AVAILABLE")
    return not is_dtensor(weight)


def is_dtensor(tensor: Any) -> bool:
    """Return whether FSDP2 has split a tensor over processes."""
    return is_a(tensor, "torch", "DTensor")


def is_zero3(tensor: Any) -> bool:
    """Return whether DeepSpeed's ZeRO-3 holds a parameter."""
    return hasattr(tensor, "ds_id")


def local_part(tensor: Any) -> Tensor:
    """Return this process's part of a tensor, or all of a tensor that is whole."""
    part: Tensor = tensor
    if is_zero3(tensor) and not is_whole(tensor):
        part = tensor.ds_tensor
    elif is_dtensor(tensor):
        part = tensor.to_local()
    return part


def refuse_unread(model: nn.Module) -> None:
    """Check that the passes of a sharded model can gather its weights.

    Raises:
        CalibrationError: weights are split, but not by FSDP2 or a running ZeRO-3 engine.
    """
    if any(map(_is_fsdp, model.modules())):
        return
    for name, parameter in model.named_parameters():
        # DeepSpeed's mark of a model whose layers it gathers as they run.
        if is_zero3(parameter) and not hasattr(model, "ds_inflight_param_registry"):
            raise CalibrationError(
                f"{name} is partitioned by ZeRO-3, but no engine gathers it; give the engine that "
                "deepspeed.initialize returns."
            )
        if is_dtensor(parameter):
            raise CalibrationError(
                f"{name} is a DTensor outside `fully_shard` (tensor parallelism?); calibrate the "
                "model before it is split, or split it by fully_shard."
            )


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Run the body, and reshard the model's weights afterwards, also after an error."""
    try:
        yield
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 forget an interrupted pass or one without backward; others are unaffected."""
    layers: Any = list(filter(_is_fsdp, model.modules()))
    for each in layers:
        each.reshard()
    root: Any = model
    if _is_fsdp(model):
        # Older torch has no such method, and before the first forward there is no state to reset.
        with contextlib.suppress(AttributeError):
            root.reset_iter_state()


def _is_fsdp(module: nn.Module) -> bool:
    return is_a(module, "torch", "FSDPModule")


def _is_split(parameter: nn.Parameter) -> bool:
    return is_dtensor(parameter) or is_zero3(parameter)


def loaded_by(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are loaded on each call."""
    names = set()
    for prefix, module in model.named_modules():
        for loader in _loaders(module):
            names |= {f"{prefix}.{n}" if prefix else n for n, _ in _tensors(module, loader)}
    return names


def can_be_loaded(module: nn.Module) -> bool:
    """Return whether `resident` can load a module's parameters (or they are already loaded)."""
    own = any(True for _ in _loaders(module))
    return own or not any(parameter.is_meta for parameter in module.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter while it runs; CPU without parameters."""
    for each in module.modules():
        for parameter in each.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
            for loader in _loaders(each):
                if loader.execution_device is not None:
                    return torch.device(loader.execution_device)
            return parameter.device
    return torch.device("cpu")


@contextlib.contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Load a module's own parameters while the body runs, as a call of the module would.

    Tensors that the body takes from it stay valid; the module itself is offloaded again.
    """
    loaders = list(_loaders(module))
    if not any(parameter.is_meta for parameter in module.parameters()):
        loaders = []
    try:
        for loader in loaders:
            loader.pre_forward(module)
        yield
    finally:
        for loader in reversed(loaders):
            loader.post_forward(module, None)


def offload_again(model: nn.Module) -> None:
    """Drop weights that are still loaded: accelerate leaves them when a call fails."""
    for module in model.modules():
        for loader in _loaders(module):
            called = hasattr(loader, "tied_pointers_to_remove")
            if called and any(not tensor.is_meta for _, tensor in _tensors(module, loader)):
                loader.post_forward(module, None)


@contextlib.contextmanager
def saved_by_reference(model: nn.Module) -> Iterator[None]:
    """Keep offloaded weights out of the graph of the forward pass that the body runs.

    When autograd saves a weight that was loaded for a call (or a view of it, or its cast under
    autocast), it stores a reference. The backward pass, in or after the body, loads the weight
    again and drops it after use, so both passes hold one or two at a time.
    """
    modules = [module for module in model.modules() if any(True for _ in _loaders(module))]
    if not modules:
        yield
        return
    running: list[nn.Module] = []
    handles: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        if running and running[-1] is module:
            running.pop()

    def pack(tensor: Tensor) -> Tensor | _Reference:
        return _reference(running, tensor) or tensor

    def unpack(saved: Tensor | _Reference) -> Tensor:
        return saved.load() if isinstance(saved, _Reference) else saved

    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Reference:
    """A view of a module's weight, perhaps cast, without the weight."""

    module: nn.Module
    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def load(self) -> Tensor:
        with torch.no_grad(), resident(self.module):
            return self.view_of(self.module.get_parameter(self.name).detach())

    def view_of(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).as_strided(self.shape, self.stride, self.offset)


def _reference(running: list[nn.Module], tensor: Tensor) -> _Reference | None:
    """Return how ``tensor`` derives from a weight of a running module; None if it does not."""
    place = tensor.untyped_storage().data_ptr()
    for module in reversed(running):
        for loader in _loaders(module):
            for name, weight in _tensors(module, loader):
                found = _Reference(
                    module,
                    name,
                    tensor.dtype,
                    tensor.shape,
                    tensor.stride(),
                    int(tensor.storage_offset()),
                )
                if weight.is_meta:
                    continue
                if weight.untyped_storage().data_ptr() == place:
                    return found
                if _may_be_cast(tensor, weight) and torch.equal(found.view_of(weight), tensor):
                    return found
    return None


def _may_be_cast(tensor: Tensor, weight: Tensor) -> bool:
    return (
        tensor.dtype != weight.dtype
        and tensor.numel() == weight.numel()
        and tensor.untyped_storage().nbytes() == weight.numel() * tensor.element_size()
        and tensor.device == weight.device
        and weight.is_contiguous()
    )


def _loaders(module: nn.Module) -> Iterator[Any]:
    """Yield accelerate's hooks that load the module's parameters before it is called."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) is True:
            yield each


def _tensors(module: nn.Module, loader: Any) -> Iterator[tuple[str, Tensor]]:
    # accelerate's `preload_module_classes` also loads the module's submodules.
    yield from module.named_parameters(recurse=loader.place_submodules, remove_duplicate=False)
