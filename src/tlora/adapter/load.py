"""A saved adapter back onto its base model, checked before the model is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tlora.adapter.attach import make_room, misleading_warnings_ignored
from tlora.adapter.freeze import complete_heads, freeze_a, lora_layers
from tlora.calibration.placement import loaded_by
from tlora.calibration.preserve import keep_gradients
from tlora.errors import AdapterError, MisfitError, TLoraError, damaged, listed
from tlora.files import adapter_fields
from tlora.integrity import has_digest
from tlora.linalg.matrices import not_finite

if TYPE_CHECKING:
    from peft import PeftModel

_PREFIX = "base_model.model."

_SIDES = {"lora_A": ("in_features", 1), "lora_B": ("out_features", 0)}


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
    freeze: bool = True,
) -> PeftModel:
    """Load a saved adapter onto the base model; when it is to train on, A stays frozen.

    Plain ``PeftModel.from_pretrained(..., is_trainable=True)`` loads the same weights but trains
    A too, since a plain PEFT folder does not say that A is frozen.

    Args:
        model: the base model.
        path: a PEFT adapter folder (or a Hub name).
        is_trainable: whether to train it further.
        adapter_name: PEFT's name of the adapter.
        freeze: freeze A; off for an adapter that was planned with ``freeze_a=False``.

    Raises:
        AdapterError: the folder holds no adapter, its weights are damaged, not finite or not of
            the model's sizes, or it is to train on and no gradient passes the model's 4-bit weights
            any more; the model is as it was. Or PEFT does not load it; the model may be half
            adapted then.
        ArtifactError: its adapter_config.json is damaged.
    """
    from peft import PeftConfig, PeftModel

    local = Path(path).is_dir() or Path(path).is_absolute() or str(path).startswith(".")
    settings = Path(path) / "adapter_config.json"
    if local and not settings.is_file():
        raise AdapterError(
            f"{path} holds no adapter_config.json; give the folder that `save_pretrained` wrote."
        )
    if local:
        fields = adapter_fields(settings)
        with damaged(settings, "save or copy the adapter again"):
            _ = fields["peft_type"]
            PeftConfig.from_pretrained(str(path))
    check_saved(path, model)
    if is_trainable:
        keep_gradients(model)
    load = load_onto_offloaded if loaded_by(model) else PeftModel.from_pretrained
    with _fitting(model, path), misleading_warnings_ignored():
        adapted = load(model, path, adapter_name=adapter_name, is_trainable=is_trainable)
    complete_heads(adapted)
    if freeze and any(lora_layers(adapted, adapter_name)):
        freeze_a(adapted, adapter_name)
    return adapted


@contextlib.contextmanager
def _fitting(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Turn what PEFT raises over a configuration that it cannot make layers of into a sentence.

    Raises:
        MisfitError: PEFT cannot.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TLoraError | MemoryError | torch.OutOfMemoryError):
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "load it onto the base that it was trained on, or save or copy it again."
        raise MisfitError(path, f"this {type(model).__name__}", said, advice) from error


def check_saved(path: str | Path, model: nn.Module) -> None:
    """Check that a folder's weights are whole, finite and of the sizes of the model's layers.

    Layers without `in_features` are left to PEFT, and so is an adapter on the Hub.

    Raises:
        AdapterError: a file is cut off or damaged, or does not match the digest that it carries,
            or a weight is not finite.
        MisfitError: a matrix has other sizes.
    """
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        return
    try:
        has_digest(file)  # an adapter that others saved has none
        with safe_open(file, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise AdapterError(
            f"{file}: cut off or damaged ({error}); save or copy the adapter again."
        ) from error
    check_finite(file, str(path))
    if misfit := next(_misfits(shapes, dict(model.named_modules())), None):
        advice = "load it onto the base that it was trained on."
        raise MisfitError(path, f"this {type(model).__name__}", misfit, advice)


def check_finite(file: Path, name: str) -> None:
    """Check that every tensor of a safetensors file is finite.

    Args:
        file: the file.
        name: what the error calls it.

    Raises:
        AdapterError: one is not.
    """
    with safe_open(file, framework="pt") as tensors:
        keys = list(tensors.keys())
        bad = [key for key in keys if not_finite({key: tensors.get_tensor(key)})]
    if bad:
        raise AdapterError(
            f"{name}: {len(bad)} of {len(keys)} tensors are not finite ({listed(bad)}); train"
            " again, with a lower learning rate or in float32."
        )


def _misfits(shapes: dict[str, list[int]], layers: dict[str, nn.Module]) -> Iterator[str]:
    for key, shape in shapes.items():
        name, _, side = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if side not in _SIDES:
            continue
        features, dimension = _SIDES[side]
        has = getattr(layers.get(name), features, None)
        if isinstance(has, int) and shape[dimension] != has:
            yield f"{name} has {has} {features}, and its {side} takes {shape[dimension]}"


def load_onto_offloaded(
    model: nn.Module, path: str | Path, *, is_trainable: bool, adapter_name: str
) -> PeftModel:
    """Load a saved adapter onto an offloaded base, which stays as it is.

    PEFT's own loading would take the base's hooks away and spread it anew over the devices that
    this machine has, adapter included.
    """
    from peft import PeftConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = not is_trainable
    adapted = get_peft_model(model, config, adapter_name=adapter_name)
    make_room(adapted, adapter_name)
    weights = load_peft_weights(str(path), device="cpu")
    set_peft_model_state_dict(adapted, weights, adapter_name=adapter_name)
    return adapted
