"""The memory budget of second moments: as given, or a share of the device's memory.

The share depends only on shapes and the device's total memory, never on the free memory, so the
same machine gives the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tlora.calibration.accumulators import moment_bytes
from tlora.calibration.group import ProcessGroup
from tlora.calibration.placement import device_of, local_part
from tlora.calibration.weights import Target
from tlora.config import TLoraConfig, bytes_text

_SHARE = 20
_MOST = 4 * 2**30
_IN_FIRST = 4


@dataclass(frozen=True)
class MemoryBudget:
    """A resolved `memory_budget`.

    Attributes:
        bytes: None: no limit.
        source: origin of the value, in words; "" if the configuration gives it.
    """

    bytes: int | None
    source: str = ""

    @property
    def first(self) -> int | None:
        """The part that a backward pass may use.

        An automatic budget leaves most of itself to the activations that wait for gradients; later
        passes do not keep these.
        """
        return self.bytes // _IN_FIRST if self.bytes and self.source else self.bytes

    def __str__(self) -> str:
        if self.bytes is None:
            return "unlimited"
        return bytes_text(self.bytes) + (", auto" if self.source else "")

    def explained(self) -> str:
        """Describe the value and its origin."""
        return f"{self}: {self.source}" if self.source else str(self)


def given(config: TLoraConfig) -> MemoryBudget:
    """Return the budget of a configuration, with no limit for "auto"."""
    return MemoryBudget(config.memory_budget_bytes)


def resolved(
    config: TLoraConfig, model: nn.Module, targets: Sequence[Target], group: ProcessGroup
) -> MemoryBudget:
    """Return the budget of a configuration for a loaded model, equal on every process.

    "auto" is the smallest value over the devices that hold targets, on all processes. Only the
    local part of sharded weights counts; offloaded weights do not stay on the device.
    """
    if config.memory_budget != "auto":
        return given(config)
    with group.raise_on_all():
        devices = {device_of(target.module) for target in targets}
        held = [(device, _weight_bytes(model, device)) for device in sorted(devices, key=str)]
        own = on_devices(held, targets)
    return _smallest(group.all_gather(own))


def on_devices(held: Iterable[tuple[torch.device, int]], targets: Sequence[Target]) -> MemoryBudget:
    """Return the value of "auto" for devices, given the bytes of weights on each.

    No limit on the CPU. On an accelerator 1/20 of the memory that the weights leave, at most 4 GiB
    and at least the largest second moment.
    """
    least = max(moment_bytes(target.d_in) for target in targets)
    found = [MemoryBudget(None)]
    for device, weights in held:
        if device.type not in ("cpu", "meta"):
            left = max(0, total_memory(device) - weights)
            room = f"the {bytes_text(left)} that the weights leave on {device}"
            share, source = left // _SHARE, f"1/{_SHARE} of {room}"
            if share > _MOST:
                share, source = _MOST, f"the maximum; {source} is more"
            if share < least:
                share, source = least, f"the largest second moment; {source} is less"
            found.append(MemoryBudget(share, source))
    return _smallest(found)


def total_memory(device: torch.device) -> int:
    """Return the total bytes of an accelerator's memory."""
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(getattr(torch, device.type).get_device_properties(device).total_memory)


def _smallest(budgets: Iterable[MemoryBudget]) -> MemoryBudget:
    limits = [budget for budget in budgets if budget.bytes is not None]
    return min(limits, key=lambda budget: budget.bytes or 0, default=MemoryBudget(None))


def _weight_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the bytes of the model's weights on ``device``."""
    parts = [local_part(parameter) for parameter in model.parameters()]
    return sum(
        part.numel() * part.element_size()
        for part in parts
        if part.device.type == device.type and device.index in (None, part.device.index)
    )
