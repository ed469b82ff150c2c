"""A model of a run without its weights: built from its config, its parameters on `meta`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlora.config import TaskType
from tlora.errors import ConfigError
from tlora.models.pretrained import Pretrained, load_class
from tlora.runconfig import RunConfig
from tlora.stages.kinds import KindSpec

if TYPE_CHECKING:
    from tlora.calibration.shapes import Spec


@dataclass
class MetaModel:
    """A model on `meta`."""

    model: Any
    task_type: TaskType | None
    """PEFT's name of its kind; None where the model has no head of the task's kind."""
    notes: list[str] = field(default_factory=list)
    """A sentence for each liberty taken."""


def model_on_meta(config: RunConfig, kind: KindSpec, labels: Sequence[str] | None) -> MetaModel:
    """Build the model of a run; no weight is read.

    A model that has no head of the task's kind is built as its config names it.

    Args:
        config: the run.
        kind: of its task.
        labels: the classes, where the task knows them.

    Raises:
        ConfigError: there is no config, or no class for it.
    """
    import torch

    found: Any = Pretrained(
        name=str(config.model), trust_remote_code=config.trust_remote_code
    ).config()
    notes: list[str] = []
    if kind.task_type == "SEQ_CLS" and labels:
        found.num_labels = len(labels)
    elif kind.task_type == "SEQ_CLS":
        count = found.num_labels
        notes.append(f"The head has {count} outputs, as the config says; the rows may say another.")
    if getattr(found, "quantization_config", None):
        del found.quantization_config
        notes.append("The config names a quantisation, whose savings are not counted.")
    elif config.quantization != "none":
        notes.append(f"The savings of {config.quantization} weights are not counted.")
    for name in ("pad_token_id", "decoder_start_token_id"):
        # Classifying decoders and encoder-decoders refuse a batch without.
        if getattr(found, name, None) is None:
            setattr(found, name, 0)
    options = {"dtype": _dtype(config, found)}
    with torch.device("meta"):
        auto = load_class(kind.auto_model)
        if type(found) in auto._model_mapping or hasattr(found, "auto_map"):
            code = config.trust_remote_code
            model = auto.from_config(found, trust_remote_code=code, **options)
            return MetaModel(model, kind.task_type, notes)
        model = _as_named(config, kind, found, notes)._from_config(found, **options)
        return MetaModel(model, None, notes)


def batch_spec(model: Any, batch: int, tokens: int) -> Spec:
    """Return the shapes of a batch of full length for ``model``, labels included.

    Raises:
        Untraceable: it reads neither text nor images.
    """
    import torch

    from tlora.calibration.shapes import Untraceable

    config, name = model.config, type(model).__name__
    per_sample = any(f"{kind}Classification" in name for kind in ("Sequence", "Image"))
    one_each = ((batch,), torch.long)
    if model.main_input_name == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        pixels = (batch, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": (pixels, model.dtype), "labels": one_each}
    if model.main_input_name != "input_ids":
        raise Untraceable(f"its input is {model.main_input_name}, neither text nor images")
    text = ((batch, tokens), torch.long)
    labels = one_each if per_sample else text
    return {"input_ids": text, "attention_mask": text, "labels": labels}


def _as_named(config: RunConfig, kind: KindSpec, found: Any, notes: list[str]) -> Any:
    import transformers

    name = (getattr(found, "architectures", None) or ["(none)"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ConfigError(
            f"{config.model!r} ({type(found).__name__}) has no {kind.task_type} head; give another"
            " --data.kind.",
            "model",
        )
    notes.append(
        f"{type(found).__name__} has no {kind.task_type} head, so {name} of its config is shown;"
        " to run, give another --data.kind or use the Python functions."
    )
    return model_class


def _dtype(config: RunConfig, found: Any) -> Any:
    import torch

    own = getattr(found, "dtype", None) or torch.float32
    if config.dtype != "auto":
        own = config.dtype
    return getattr(torch, own) if isinstance(own, str) else own
