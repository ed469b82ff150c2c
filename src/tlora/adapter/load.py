"""Loads a saved adapter onto its base model, with checks before the model changes."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tlora.adapter import bottleneck
from tlora.adapter.attach import make_room, misleading_warnings_ignored
from tlora.adapter.freeze import complete_heads, freeze_a, lora_layers
from tlora.adapter.savedconfig import CONFIG, WEIGHTS, check_fields
from tlora.calibration.placement import loaded_by
from tlora.calibration.preserve import keep_gradients
from tlora.calibration.targets import taken_for_experts
from tlora.errors import AdapterError, MisfitError, TLoraError, damaged, listed
from tlora.integrity import has_digest
from tlora.linalg.matrices import not_finite
from tlora.sealed import adapter_fields

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."
_SIZES = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, the"
    r" shape in current model is torch\.Size\((.*?)\)"
)
"""How torch names a tensor, its shape in a file and its shape in the model."""

FLOATS = ("F16", "BF16", "F32", "F64")
"""safetensors' names of floating-point dtypes with at least 16 bits."""
_SIDES = {"lora_A": ("in_features", 1), "lora_B": ("out_features", 0)}

_PARTS = re.compile(r"\.(lora_|base_layer\b|modules_to_save\b|token_adapter\b)")
"""Suffixes that PEFT appends to a module's name in tensor names."""
_CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
    freeze: bool = True,
) -> PeftModel:
    """Load a saved adapter onto the base model; unlike in PEFT, A stays frozen in further training.

    Args:
        model: the base model.
        path: a PEFT adapter folder (or a Hub name).
        is_trainable: whether to train it further.
        adapter_name: PEFT's name of the adapter.
        freeze: freeze A; false for an adapter planned with ``freeze_a=False``.

    Raises:
        AdapterError: the folder holds no adapter, its weights are damaged, incomplete, not finite
            or do not match the model's modules and sizes, or the model's 4-bit weights block
            gradients; the model is unchanged. If PEFT fails to load it, the model may be partly
            adapted.
        ArtifactError: its adapter_config.json is damaged.
    """
    from peft import PeftModel

    fields = _saved_fields(path)
    if fields.get("peft_type") == bottleneck.PEFT_TYPE:
        return bottleneck.load(model, Path(path), fields, is_trainable)
    with _fitting(model, path):
        check_saved(path, model, fields)
    if is_trainable:
        keep_gradients(model)
    load = load_onto_offloaded if loaded_by(model) else PeftModel.from_pretrained
    with _fitting(model, path), misleading_warnings_ignored():
        warnings.filterwarnings("error", message=".*Found missing adapter keys")
        adapted = load(model, path, adapter_name=adapter_name, is_trainable=is_trainable)
    complete_heads(adapted)
    if freeze and any(lora_layers(adapted, adapter_name)):
        freeze_a(adapted, adapter_name)
    return adapted


def _saved_fields(path: str | Path) -> dict[str, Any]:
    """Return the checked fields of a folder's adapter_config.json; {} for an adapter on the Hub.

    Raises:
        AdapterError: the folder has no such file.
        ArtifactError: it is damaged.
    """
    from peft import PeftConfig

    settings = Path(path) / CONFIG
    if not (Path(path).is_dir() or Path(path).is_absolute() or str(path).startswith(".")):
        return {}
    if not settings.is_file():
        raise AdapterError(
            f"{path} holds no adapter_config.json; give the folder that `save_pretrained` wrote."
        )
    fields = adapter_fields(settings)
    with damaged(settings, "save or copy the adapter again"):
        if fields["peft_type"] != bottleneck.PEFT_TYPE:
            PeftConfig.from_pretrained(str(path))
    return fields


@contextlib.contextmanager
def _fitting(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Raise a clear error if PEFT cannot build layers from a configuration.

    Raises:
        MisfitError: PEFT cannot build them.
        AdapterError: the saved ranks contradict adapter_config.json.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TLoraError | MemoryError | torch.OutOfMemoryError):
            raise
        sizes = _SIZES.search(str(error))
        if sizes and ".lora_" in sizes[1]:
            raise AdapterError(
                f"{path}: {sizes[1]} has shape {sizes[2]} in the file, and {sizes[3]} by "
                "adapter_config.json (`r`, `rank_pattern`); restore adapter_config.json, "
                "or copy the adapter again."
            ) from error
        said = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "load it onto its own base model, or save or copy it again."
        raise MisfitError(path, f"this {type(model).__name__}", said, advice) from error


def check_saved(path: str | Path, model: nn.Module, fields: dict[str, Any]) -> None:
    """Check that a folder's weights are complete, finite and match the model's layers.

    PEFT checks layers without `in_features` and adapters on the Hub.

    Args:
        path: the folder.
        model: the base model.
        fields: of the folder's adapter_config.json.

    Raises:
        AdapterError: a field of the configuration is invalid, a file is truncated or damaged or
            does not match its digest, or a weight is not finite.
        MisfitError: a matrix has other sizes, a tensor matches no module, or a module in the
            configuration has no matrices.
    """
    if fields.get("peft_type") == "LORA":
        check_fields(path, fields)
    file = Path(path) / WEIGHTS
    if not file.is_file():
        return
    shapes = sound_shapes(file)
    where = f"this {type(model).__name__}"
    if misfit := next(_misfits(shapes, dict(model.named_modules())), None):
        raise MisfitError(path, where, misfit, "load it onto its own base model.")
    if fields.get("peft_type") == "LORA":
        if foreign := _unmatched(shapes, model):
            misfit = f"the model has no module {listed(foreign)}"
            raise MisfitError(path, where, misfit, "load it onto its own base model.")
        if lacking := _lacking(shapes, model, fields):
            misfit = (
                f"its file has no matrices for {listed(lacking)}, which its configuration adapts"
            )
            raise MisfitError(path, where, misfit, "save or copy the adapter again.")


def sound_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes in an adapter's weight file, after checking its values.

    Raises:
        AdapterError: it is truncated or damaged, does not match its digest, or a tensor is not
            finite.
    """
    try:
        has_digest(file)  # adapters saved by other tools have none
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, ValueError) as error:
        raise AdapterError(
            f"{file}: cut off or damaged ({error}); save or copy the adapter again."
        ) from error
    check_finite(file, str(file.parent))
    return shapes


def check_finite(file: Path, name: str) -> None:
    """Check that every tensor of a safetensors file is finite.

    Args:
        file: the file.
        name: its name in the error.

    Raises:
        AdapterError: a tensor is not finite.
    """
    with safe_open(file, framework="pt") as tensors:
        keys = [k for k in tensors.keys() if tensors.get_slice(k).get_dtype() in FLOATS]  # noqa: SIM118
        bad = [key for key in keys if not_finite({key: tensors.get_tensor(key)})]
    if bad:
        raise AdapterError(
            f"{name}: {len(bad)} of {len(keys)} tensors are not finite "
            f"({listed(bad)}); train again with a lower learning rate or in float32."
        )


def _misfits(shapes: dict[str, tuple[int, ...]], layers: dict[str, nn.Module]) -> Iterator[str]:
    for key, shape in shapes.items():
        name, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if side not in _SIDES:
            continue
        features, dimension = _SIDES[side]
        has = getattr(layers.get(name), features, None)
        if isinstance(has, int) and shape[dimension] != has:
            yield f"{name} has {has} {features}, and its {side} takes {shape[dimension]}"


def _unmatched(shapes: dict[str, tuple[int, ...]], model: nn.Module) -> list[str]:
    """Return the modules in a file's tensor names that the model does not have."""
    if getattr(model, "_checkpoint_conversion_mapping", None):
        return []  # PEFT renames the tensors
    known = dict(model.named_modules(remove_duplicate=False))
    foreign = [name for name in dict.fromkeys(map(module_of, shapes)) if name not in known]
    taken = {*taken_for_experts(model, foreign)} if foreign else set()
    return [name for name in foreign if name not in taken]


def _lacking(
    shapes: dict[str, tuple[int, ...]], model: nn.Module, fields: dict[str, Any]
) -> list[str]:
    """Return the modules that PEFT would adapt by a configuration but that have no tensor."""
    renamed = getattr(model, "_checkpoint_conversion_mapping", None)
    if renamed or fields.get("layer_replication"):
        return []
    targeted = targeted_names(fields, (name for name, _ in model.named_modules()))
    there = set(map(module_of, shapes))
    lacking = [name for name in targeted if name not in there]
    taken = {*taken_for_experts(model, lacking)} if lacking else set()
    return [name for name in lacking if name not in taken]


def module_of(key: str) -> str:
    """Return the full name of the module that a tensor of an adapter belongs to.

    Example:
        >>> module_of("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
        'model.layers.0.mlp.up_proj'
    """
    name, *parts = _PARTS.split(key.removeprefix(PREFIX), maxsplit=1)
    return name if parts else name.rpartition(".")[0]


def targeted_names(fields: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return the modules that a saved configuration adapts, by PEFT's matching.

    An empty list for "all-linear", which matches by type.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    wanted = fields.get("target_modules")
    if not wanted or str(wanted).lower() == "all-linear":
        return []
    heads = fields.get("modules_to_save") or []
    rule = LoraConfig(**{name: fields.get(name) for name in _CHOOSING}, modules_to_save=heads)
    return [
        name
        for name in names
        # Matching by suffix, PEFT also finds modules that train in full (DistilBERT's
        # pre_classifier).
        if name and not name.endswith(tuple(heads)) and check_target_module_exists(rule, name)
    ]


def load_onto_offloaded(
    model: nn.Module, path: str | Path, *, is_trainable: bool, adapter_name: str
) -> PeftModel:
    """Load a saved adapter onto an offloaded base model, which stays offloaded.

    PEFT's own loading would remove the base's hooks and dispatch it again over this machine's
    devices, together with the adapter.
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
