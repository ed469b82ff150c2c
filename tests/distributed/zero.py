"""A stand-in of DeepSpeed's ZeRO-3: its parameters and `zero.GatheredParameters`, over gloo.

A partitioned parameter is empty and carries ``ds_id``, ``ds_status``, ``ds_shape`` and this
process's part, ``ds_tensor``. Each Linear gathers its weight for its call. Unlike DeepSpeed's,
these weights are never whole when a gradient arrives, which is the harder case.
"""

from __future__ import annotations

import enum
import types
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


GATHERED: list[int] = []
"""The ``ds_id`` of every parameter gathered, one entry for each that is held at the time."""


class GatheredParameters:
    """Bring parameters together while the body runs; to be entered by every process."""

    def __init__(self, params: list[Any]) -> None:
        self.params = params

    def __enter__(self) -> None:
        for parameter in self.params:
            assert parameter.ds_status is Status.NOT_AVAILABLE
            parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, parameter.ds_tensor)
            whole = torch.cat(parts)[: parameter.ds_shape.numel()]
            parameter.data = whole.view(parameter.ds_shape)
            parameter.ds_status = Status.AVAILABLE
            GATHERED.append(parameter.ds_id)

    def __exit__(self, *_: Any) -> None:
        for parameter in self.params:
            release(parameter)


MODULE: Any = types.ModuleType("deepspeed")
MODULE.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)


def release(parameter: Any) -> None:
    parameter.data = torch.empty(0)
    parameter.ds_status = Status.NOT_AVAILABLE


def partition(model: nn.Module) -> list[Any]:
    """Partition the weights of all Linears; return them."""
    kept = []
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight: Any = module.weight
        size = dist.get_world_size()
        share = -(-weight.numel() // size)
        flat = torch.zeros(share * size)
        flat[: weight.numel()] = weight.detach().flatten()
        weight.ds_id, weight.ds_shape = len(kept), weight.shape
        weight.ds_tensor = flat[share * dist.get_rank() :][:share].clone()
        release(weight)
        module.forward = partial(_linear, module)  # type: ignore[method-assign]
        kept.append(weight)
    # As DeepSpeed's engine marks the model that it runs.
    model.ds_inflight_param_registry = {}  # type: ignore[assignment]
    return kept


def _linear(module: nn.Linear, rows: Tensor) -> Tensor:
    with GatheredParameters([module.weight]):
        weight = module.weight.detach().clone()
    return nn.functional.linear(rows, weight, module.bias)
