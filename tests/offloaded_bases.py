"""Ways in which accelerate offloads a model, each run on the CPU; needs nothing of tlora."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


def on_disk(model: Any, folder: Path) -> Any:
    """Every parameter on disk."""
    return accelerate.disk_offload(model, str(folder / "all"))


def in_memory(model: Any, folder: Path) -> Any:
    """Every parameter in a state dict of the CPU."""
    return accelerate.cpu_offload(model)


def by_map(model: Any, folder: Path) -> Any:
    """Loaded by from_pretrained with a device map: embeddings on the CPU, the rest on disk."""
    model.save_pretrained(folder / "saved")
    weight = model.get_input_embeddings().weight
    kept = [n for n, m in model.named_modules() if getattr(m, "weight", None) is weight]
    loaded = type(model).from_pretrained(
        folder / "saved",
        device_map=dict(_placed(model, "", kept)),
        offload_folder=folder / "map",
        dtype=model.dtype,
    )
    return loaded.eval()


def _placed(module: nn.Module, name: str, kept: list[str]) -> Iterator[tuple[str, str]]:
    if name in kept:
        yield name, "cpu"
    elif name and not any(each.startswith(f"{name}.") for each in kept):
        yield name, "disk"
    else:
        for child_name, child in module.named_children():
            yield from _placed(child, f"{name}.{child_name}" if name else child_name, kept)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "disk": on_disk,
    "memory": in_memory,
    "map": by_map,
}


def hooks(model: nn.Module) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    """Yield the modules that load parameters, each with the hook that does."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if isinstance(each, AlignDevicesHook) and each.offload:
                yield module, each


def is_offloaded(model: nn.Module) -> bool:
    """Whether nothing is loaded of what is offloaded between calls, and something is."""
    found = list(hooks(model))
    return bool(found) and all(
        p.is_meta
        for module, hook in found
        for p in module.parameters(recurse=hook.place_submodules)
    )


class Loaded:
    """Counts the matrices that the hooks of a model have loaded and that are still alive.

    Attributes:
        times: loads so far.
        peak: the most that were alive at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.times = 0
        self.peak = 0
        self._references: list[StorageWeakRef] = []
        for _, hook in hooks(model):
            hook.weights_map = _Counted(hook.weights_map, self)

    @property
    def alive(self) -> int:
        """How many are alive now."""
        self._references = [each for each in self._references if not each.expired()]
        return len(self._references)

    def add(self, tensor: Tensor) -> None:
        if tensor.dim() > 1:
            self.times += 1
            self._references.append(StorageWeakRef(tensor.untyped_storage()))
            self.peak = max(self.peak, self.alive)


class _Counted(Mapping[str, Tensor]):
    """A hook's map of weights, each handed out as a new copy, as a device's memory would get it."""

    def __init__(self, weights: Mapping[str, Tensor], log: Loaded) -> None:
        self.weights = weights
        self.log = log
        if hasattr(weights, "dataset"):
            self.dataset = weights.dataset

    def __getitem__(self, key: str) -> Tensor:
        value = self.weights[key]
        value = torch.empty_like(value).copy_(value)
        self.log.add(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
