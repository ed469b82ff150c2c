"""Models inside the engines that train them: what wraps a model, who keeps its weights in parts.

FSDP2 (`fully_shard`) and DeepSpeed's ZeRO-3 split every parameter over the ranks and bring a
layer's together while it runs. Each rank has to run the same passes then. An engine's own names
are enough to know it by, so none is imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tlora.errors import AdapterError, CalibrationError

_WRAPPERS = {
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "OptimizedModule"): "_orig_mod",
    ("deepspeed", "DeepSpeedEngine"): "module",
}


def is_a(thing: Any, library: str, name: str) -> bool:
    """Return whether a class ``name`` of ``library`` is among the classes of ``thing``."""
    return any(
        kind.__name__ == name and kind.__module__.partition(".")[0] == library
        for kind in type(thing).__mro__
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the base model inside DDP, a DeepSpeed engine or torch.compile: its own names count.

    Raises:
        CalibrationError: it is wrapped by the first FSDP, which keeps no single weights.
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

    PEFT could, but the engine would neither shard the new parameters nor share their gradients.

    Raises:
        AdapterError: the model is in an engine already.
    """
    fsdp = any(map(_is_fsdp, model.modules()))
    if fsdp or any(is_a(model, *wrapper) for wrapper in _WRAPPERS):
        how = "sharded by fully_shard" if fsdp else f"wrapped by {type(model).__name__}"
        raise AdapterError(
            f"the model is {how}, which would not train what is attached now; attach before that"
            " (a plan that was made from the sharded model fits the plain one)."
        )


def class_name(model: nn.Module) -> str:
    """Return the name of a model's own class, without what `fully_shard` puts before it."""
    kinds = type(model).__mro__
    own = [k for k in kinds if not any(base.__name__ == "FSDPModule" for base in k.__mro__)]
    return own[0].__name__


def is_sharded(model: nn.Module) -> bool:
    """Return whether the ranks hold a model's weights in parts."""
    return any(map(_is_fsdp, model.modules())) or any(map(_is_split, model.parameters()))


def is_whole(weight: Any) -> bool:
    """Return whether a weight can be read here and now, without the other ranks."""
    if is_zero3(weight):
        return weight.ds_status.name == "AVAILABLE"
    return not is_dtensor(weight)


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is split over ranks the way of FSDP2."""
    return is_a(tensor, "torch", "DTensor")


def is_zero3(tensor: Any) -> bool:
    """Return whether a parameter is kept by DeepSpeed's ZeRO-3."""
    return hasattr(tensor, "ds_id")


def local_part(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor, all of it where it is whole."""
    if is_zero3(tensor) and not is_whole(tensor):
        return tensor.ds_tensor
    return tensor.to_local() if is_dtensor(tensor) else tensor


def refuse_unread(model: nn.Module) -> None:
    """Check that the passes of a sharded model find its weights.

    Raises:
        CalibrationError: weights are split, but not by FSDP2 or a running ZeRO-3 engine.
    """
    if any(map(_is_fsdp, model.modules())):
        return
    for name, parameter in model.named_parameters():
        # DeepSpeed's mark of a model whose layers it brings together as they run.
        if is_zero3(parameter) and not hasattr(model, "ds_inflight_param_registry"):
            raise CalibrationError(
                f"{name} is partitioned by ZeRO-3, but no engine brings it together; give the"
                " engine that deepspeed.initialize returns."
            )
        if is_dtensor(parameter):
            raise CalibrationError(
                f"{name} is a DTensor outside `fully_shard` (tensor parallelism?); calibrate the"
                " model before it is split, or split it by fully_shard."
            )


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Run the body, and leave the model's weights in parts, whatever happens."""
    try:
        yield
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 forget a pass that was cut short, or had no backward; others are left alone."""
    layers: Any = list(filter(_is_fsdp, model.modules()))
    for each in layers:
        each.reshard()
    root: Any = model
    if _is_fsdp(model):
        # Older torch has no such method, and before the first forward there is nothing to forget.
        with contextlib.suppress(AttributeError):
            root.reset_iter_state()


def _is_fsdp(module: nn.Module) -> bool:
    return is_a(module, "torch", "FSDPModule")


def _is_split(parameter: nn.Parameter) -> bool:
    return is_dtensor(parameter) or is_zero3(parameter)
