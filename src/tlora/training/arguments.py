"""The training arguments: what the user gave, over our defaults, over the library's."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, first_line
from tlora.models.pretrained import load_class
from tlora.training.kinds import KindSpec
from tlora.training.replies import generation_fields

if TYPE_CHECKING:
    from tlora.training.setup import Setup


def training_arguments(setup: Setup, output_dir: Path) -> Any:
    """Make the training arguments: the user's fields over our defaults over the library's.

    Ours: nothing is reported to a service; half precision and gradient checkpointing, which TRL
    turns on, stay off on a machine without an accelerator, where they only cost; the ranks of a
    launch talk by gloo there. A task that reads replies is evaluated by generating them.

    Raises:
        ConfigError: transformers or TRL refuse a value; their sentence says why.
        DataError: replies are to be read, and the tokenizer does not give the responses back.
    """
    arguments = load_class(setup.kind.arguments)
    known = {field.name: field for field in dataclasses.fields(arguments)}
    # YAML reads a bare `no` as false, and "no" is the name of a strategy.
    given = {
        name: "no" if name.endswith("_strategy") and value is False else value
        for name, value in setup.config.trainer.items()
    }
    ours = _chosen(known, given)
    ours |= generation_fields(setup)
    fixed: dict[str, Any] = {"output_dir": str(output_dir), "seed": setup.config.seed}
    if "max_length" in known:
        fixed["max_length"] = setup.task.data.max_length
    if "dataset_kwargs" in known and not given.get("packing"):
        # The rows are tokens of the right length already.
        fixed["dataset_kwargs"] = {"skip_prepare_dataset": True}
    try:
        return arguments(**{**ours, **given, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(first_line(error), where="trainer") from error


def defaults(kind: KindSpec) -> dict[str, Any]:
    """Return the value of each training argument that holds here where the user gives none."""
    fields = dataclasses.fields(load_class(kind.arguments))
    return {field.name: field.default for field in fields} | _chosen(
        {field.name: field for field in fields}, {}
    )


def _chosen(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return our defaults over the library's.

    Args:
        known: fields of the training arguments by name.
        given: what the user gives.
    """
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    chosen: dict[str, Any] = {"report_to": "none", "label_names": ["labels"]}
    if known["bf16"].default is None and not is_torch_bf16_gpu_available():
        chosen["bf16"] = False
    if not torch.accelerator.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Left to themselves the ranks of a launch on a CPU would each train on their own.
        chosen |= {"use_cpu": True, "ddp_backend": "gloo"}
    if not torch.cuda.is_available():
        chosen["dataloader_pin_memory"] = False
        # transformers 5.2x gave the field its new name; the old one still speaks, with a warning.
        names = ("activation_checkpointing", "gradient_checkpointing")
        if not any(name in given for name in names):
            chosen[next(name for name in names if name in known)] = False
    return chosen
