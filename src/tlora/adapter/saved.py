"""What a saved adapter's files say, read before a model is changed by loading them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from tlora.errors import AdapterError, MisfitError

_PREFIX = "base_model.model."
_SIDES = {"lora_A": ("in_features", 1), "lora_B": ("out_features", 0)}


def check_saved(path: str | Path, model: nn.Module) -> None:
    """Check that a folder's weights are whole and of the sizes of the model's layers.

    Layers without `in_features` are left to PEFT, and so is an adapter on the Hub.

    Raises:
        AdapterError: a file is cut off or damaged, or a matrix has other sizes (`MisfitError`).
    """
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"{file}: cut off or damaged ({error}); save or copy the adapter again."
        ) from error
    if misfit := next(_misfits(shapes, dict(model.named_modules())), None):
        advice = "load it onto the base that it was trained on."
        raise MisfitError(path, f"this {type(model).__name__}", misfit, advice)


def _misfits(shapes: dict[str, list[int]], layers: dict[str, nn.Module]) -> Iterator[str]:
    for key, shape in shapes.items():
        name, _, side = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if side not in _SIDES:
            continue
        features, dimension = _SIDES[side]
        has = getattr(layers.get(name), features, None)
        if isinstance(has, int) and shape[dimension] != has:
            yield f"{name} has {has} {features}, and its {side} takes {shape[dimension]}"
