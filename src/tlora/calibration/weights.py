"""A target, one linear map to adapt, and its weight as an m x d matrix, in any storage format.

`_STORAGES` has one row per storage format: its class names, and how to read it. A quantizing
library is imported only when one of its modules is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tlora.calibration.placement import is_a, is_dtensor, is_whole, is_zero3, resident
from tlora.errors import AdapterError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Flags that transformers' `use_experts_implementation` sets on a module of fused experts. Only
# these flags are read, never the name of a model.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")

DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertPart:
    """One expert's matrix in a fused parameter.

    Attributes:
        parameter: the parameter's full name in the model.
        attribute: its name in the module.
        index: index of the expert.
        count: E, number of experts in the parameter.
    """

    parameter: str
    attribute: str
    index: int
    count: int

    @property
    def reads_hidden(self) -> bool:
        """Whether its input is the activated h instead of the module's input rows."""
        return self.attribute == DOWN


def has_layout(module: nn.Module) -> bool:
    """Return whether a module declares the layout of its fused experts."""
    return all(hasattr(module, flag) for flag in _FLAGS)


@dataclass(frozen=True)
class Target:
    """One linear map to adapt: y = W x + b with W of d_out x d_in (m x d).

    Attributes:
        name: the module's full name in the model; for an expert, "...experts.gate_up_proj[3]".
        module: the module that holds W.
        d_in: d.
        d_out: m.
        part: the matrix of a fused parameter; None: the module's own weight.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    part: ExpertPart | None = None

    @property
    def adapter(self) -> str:
        """Name of the unit that PEFT adapts: the module, or the parameter of the experts."""
        return self.name if self.part is None else self.part.parameter


def part_shape(module: Any, attribute: str) -> tuple[int, int]:
    """Return m and d of one expert's matrix."""
    _, rows, columns = module.get_parameter(attribute).shape
    return (columns, rows) if module.is_transposed else (rows, columns)


def read_part(module: Any, part: ExpertPart) -> Tensor:
    """Return one expert's matrix as m x d, a view of the parameter."""
    matrix: Tensor = module.get_parameter(part.attribute)[part.index]
    return matrix.T if module.is_transposed else matrix


def inward_name(module: Any) -> str:
    """Return the name of the parameter that multiplies the input rows first."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def dense_weight(target: Target) -> Tensor:
    """Return W of a target as d_out x d_in float32, without gradient; a view where possible.

    Each call dequantizes a quantized weight or loads an offloaded one again, so only the caller's
    copies stay alive; the stored weight is only read. A weight sharded over processes is gathered,
    so every process must call this.

    Raises:
        AdapterError: the weight is on the meta device, has an unknown storage format, or cannot be
            read as it is; the supported formats are named.
    """
    return stored_weight(target).to(torch.float32)


def stored_weight(target: Target) -> Tensor:
    """Return W as `dense_weight` does, in the float dtype that stores it or that it dequantizes to.

    Raises:
        AdapterError: as `dense_weight`.
    """
    with resident(target.module), torch.no_grad():
        return _read(target).detach()


def _read(target: Target) -> Tensor:
    """Return a resident weight as d_out x d_in of any float dtype; may be a view of it.

    Raises:
        AdapterError: as `dense_weight`.
    """
    module = target.module
    if any(parameter.is_meta for parameter in module.parameters()):
        raise AdapterError(f"{target.name}: its weight is on `meta`; load the model's weights.")
    if target.part is not None:
        return read_part(module, target.part)
    storage = next((each for each in _STORAGES if each.holds(module)), None)
    if storage is None:
        known = ", ".join(each.name for each in _STORAGES)
        raise AdapterError(
            f"{target.name}: its weight is stored as {_described(module)}, which cannot be "
            f"read as a matrix; supported are {known}: load the model in one of these."
        )
    try:
        weight = storage.read(module)
    except _Unreadable as reason:
        raise AdapterError(f"{target.name}: {reason}.") from None
    if weight.shape != (target.d_out, target.d_in):
        raise AdapterError(
            f"{target.name}: its {storage.name} weight reads as {tuple(weight.shape)}, but it maps"
            f" {target.d_in} to {target.d_out} features; reload the model."
        )
    return weight


def is_hqq_linear(module: nn.Module) -> bool:
    """Return whether a module is HQQ's linear layer, which does not subclass nn.Linear."""
    return is_a(module, "hqq", "HQQLinear")


def is_4bit_linear(module: nn.Module) -> bool:
    """Return whether a module is bitsandbytes' 4-bit linear layer."""
    return is_a(module, "bitsandbytes", "Linear4bit")


def is_8bit_linear(module: nn.Module) -> bool:
    """Return whether a module is bitsandbytes' 8-bit linear layer."""
    return is_a(module, "bitsandbytes", "Linear8bitLt")


def is_whole_weight(module: nn.Module) -> bool:
    """Return whether this process can read a module's weight without the others."""
    return all(map(is_whole, module.parameters(recurse=False)))


def repacked(module: nn.Module) -> bool:
    """Return whether bitsandbytes has rewritten a 4-bit weight for inference on this CPU."""
    return is_4bit_linear(module) and getattr(_quant_state(module), "packing_format_for_cpu", False)


class _Unreadable(Exception):
    """Why a weight of a known storage format cannot be read; internal."""


@dataclass(frozen=True)
class _Storage:
    name: str
    holds: Callable[[nn.Module], bool]
    read: Callable[[Any], Tensor]
    """Gives d_out x d_in of any float dtype; may be a view of the stored weight."""


def _described(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    kinds = [type(module).__name__]
    if isinstance(weight, Tensor):
        kinds += [type(weight).__name__, str(weight.dtype)]
    return " of ".join(kinds)


def holds_floats(module: nn.Module) -> bool:
    """Return whether a module's weight is a plain tensor of a float dtype of at least two bytes."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and is_float(module, weight)


def is_float(module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a parameter of ``module`` stores plain numbers and can train.

    A subclass of Tensor may report a float dtype and store something else, and so does bitsandbytes
    with `bnb_4bit_quant_storage`.
    """
    packed = is_4bit_linear(module) and parameter is getattr(module, "weight", None)
    return type(parameter.data) is Tensor and parameter.dtype in _FLOATS and not packed


def _read_floats(module: Any) -> Tensor:
    matrix: Tensor = module.weight.T if isinstance(module, Conv1D) else module.weight
    return matrix


def _read_dtensor(module: Any) -> Tensor:
    whole: Tensor = module.weight.full_tensor()
    return whole.T if isinstance(module, Conv1D) else whole


def _read_zero3(module: Any) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([module.weight]):
        return _read_floats(module).detach().clone()


def _quant_state(module: nn.Module) -> Any:
    # The module keeps it too, in case a wrapper (FSDP) has recreated the parameter.
    weight = getattr(module, "weight", None)
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


def _read_4bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if repacked(module):
        raise _Unreadable(
            "bitsandbytes has rewritten its 4-bit weight for inference on this CPU (a call "
            "in eval mode without gradient); reload the model, and plan before running it"
        )
    dense: Tensor = dequantize_4bit(module.weight.data, _quant_state(module))
    return dense


def _read_8bit(module: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = module.weight
    # The first call of the module moves the scales from the parameter to the state.
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    dense: Tensor = int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return dense


_STORAGES = (
    _Storage("sharded by FSDP2", lambda m: is_dtensor(getattr(m, "weight", None)), _read_dtensor),
    _Storage(
        "sharded by ZeRO-3",
        lambda m: is_zero3(weight := getattr(m, "weight", None)) and not is_whole(weight),
        _read_zero3,
    ),
    _Storage("floating point", holds_floats, _read_floats),
    _Storage(
        "bitsandbytes 4-bit",
        lambda m: is_4bit_linear(m) and _quant_state(m) is not None,
        _read_4bit,
    ),
    _Storage("bitsandbytes 8-bit", is_8bit_linear, _read_8bit),
    _Storage(
        "torchao int8",
        lambda m: is_a(getattr(m, "weight", None), "torchao", "Int8Tensor"),
        lambda m: m.weight.dequantize(),
    ),
    _Storage("HQQ", is_hqq_linear, lambda m: m.dequantize()),
)
