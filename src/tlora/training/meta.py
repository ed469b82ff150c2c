"""A model of a run without its weights: built from its config, its parameters on `meta`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlora.config import TaskType
from tlora.errors import ConfigError
from tlora.models.pretrained import Pretrained, load_class
from tlora.training.kinds import KindSpec
from tlora.training.runconfig import RunConfig

if TYPE_CHECKING:
    from tlora.calibration.weights import Target

logger = logging.getLogger(__name__)


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
        notes.append("The config names a quantization, whose savings are not counted.")
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


def input_sources(model: Any, targets: Sequence[Target]) -> dict[str, int]:
    """Return a number for each target that runs on `meta`, equal for those of one input.

    A pass that asks for values (to route tokens, say) ends there. Experts in fused parameters share
    no rows, and are left out.

    Args:
        model: on `meta`; left as it was, but in eval mode.
        targets: the modules that are adapted.
    """
    import torch

    from tlora.calibration.batches import TokenLayout
    from tlora.calibration.hooks import Record, recording

    records = [Record(target) for target in targets if target.part is None]
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.device("meta"),
            recording(model, records, TokenLayout(1, None), backward=False),
        ):
            model(**_sample(model))
    except Exception:  # whatever a model's own code raises where there are no values
        logger.debug("the forward pass on `meta` of %s ended early", type(model), exc_info=True)
    numbers: dict[Any, int] = {}
    sources = {}
    for record in records:
        # Tensors on `meta` have storages, but no addresses.
        inputs = [call.inputs for call in record.calls]
        seen = [(x.untyped_storage()._cdata, x.storage_offset(), x.stride()) for x in inputs]
        if seen:
            key = (record.target.d_in, *seen)
            sources[record.target.name] = numbers.setdefault(key, len(numbers))
    return sources


def _sample(model: Any) -> dict[str, Any]:
    """Return the smallest batch that ``model`` takes, on `meta`."""
    import torch

    config = model.config
    if model.main_input_name == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.empty(1, channels, height, width, dtype=model.dtype)}
    ids = torch.empty(1, 8, dtype=torch.long)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


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
