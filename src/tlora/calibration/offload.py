"""Models larger than their device: weights that accelerate keeps elsewhere and loads call by call.

Between calls such a parameter stands on `meta`. accelerate's hook on its module (AlignDevicesHook)
loads it before a call and drops it after. That bounds a forward pass, but not a backward pass:
autograd keeps each Linear's weight for the gradient of its input, and so, after a forward pass,
all of them. Here it keeps a reference in place of an offloaded weight, and the backward pass loads
it again. Models without offloaded parameters are left alone, and cost nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def loaded_by(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are loaded call by call."""
    names = set()
    for prefix, module in model.named_modules():
        for loader in _loaders(module):
            names |= {f"{prefix}.{n}" if prefix else n for n, _ in _tensors(module, loader)}
    return names


def can_be_loaded(module: nn.Module) -> bool:
    """Return whether `resident` gives a module's parameters values (they may have them already)."""
    own = any(True for _ in _loaders(module))
    return own or not any(parameter.is_meta for parameter in module.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's first parameter is, or is while the module runs; CPU without any."""
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
    """Have a module's own parameters loaded while the body runs, as in a call of the module.

    A tensor that the body takes from it stays; the module itself is offloaded again.
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
    """Drop what is still loaded: accelerate leaves it so where a call did not come to its end."""
    for module in model.modules():
        for loader in _loaders(module):
            called = hasattr(loader, "tied_pointers_to_remove")
            if called and any(not tensor.is_meta for _, tensor in _tensors(module, loader)):
                loader.post_forward(module, None)


@contextlib.contextmanager
def saved_by_reference(model: nn.Module) -> Iterator[None]:
    """Let no offloaded weight outlive its call in the graph of the forward pass that the body runs.

    What autograd saves of a weight that was loaded for a call (the weight, a view of it, or its
    cast under autocast) becomes a reference. The backward pass, in or after the body, loads the
    weight again and drops it after use, so both passes hold one or two at a time.
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
    """Return what ``tensor`` is of a weight of the modules that are running, None if nothing."""
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
    # accelerate's `preload_module_classes` load what is below the module with it.
    yield from module.named_parameters(recurse=loader.place_submodules, remove_duplicate=False)
