"""The training arguments: what the user gave, over our defaults, over the library's.

A task that reads replies is evaluated by generating: replies are decoded, read and scored by it.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.checks import fitted
from tlora.errors import ConfigError, first_line
from tlora.models.pretrained import load_class
from tlora.tasks.tokens import IGNORED
from tlora.training.availability import check_arguments
from tlora.training.kinds import KindSpec

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from tlora.training.setup import Setup


def training_arguments(setup: Setup, output_dir: Path) -> Any:
    """Make the training arguments: the user's fields over our defaults over the library's.

    Ours: nothing is reported to a service; losses are logged as they are; half precision and
    gradient checkpointing, which TRL turns on, stay off on a machine without an accelerator, where
    they only cost; the ranks of a launch talk by gloo there. A task that reads replies is evaluated
    by generating them.

    Raises:
        ConfigError: transformers or TRL refuse a value (their sentence says why), or what it asks
            for is not installed.
        DataError: replies are to be read, and the tokenizer does not give the responses back.
    """
    arguments = load_class(setup.kind.arguments)
    known = {field.name: field for field in dataclasses.fields(arguments)}
    # YAML reads a bare `no` as false, and "no" is the name of a strategy.
    given = {
        name: "no" if name.endswith("_strategy") and value is False else value
        for name, value in setup.config.trainer.items()
    }
    given |= {name: fitted(known[name].type, value) for name, value in given.items()}
    ours = _chosen(known, given)
    ours |= _generation_fields(setup)
    if setup.config.early_stopping:
        ours |= _stopping_fields(given)
    fixed: dict[str, Any] = {"output_dir": str(output_dir), "seed": setup.config.seed}
    if "max_length" in known:
        fixed["max_length"] = setup.task.data.max_length
    if "dataset_kwargs" in known and not given.get("packing"):
        # The rows are tokens of the right length already.
        fixed["dataset_kwargs"] = {"skip_prepare_dataset": True}
    try:
        made = arguments(**{**ours, **given, **fixed})
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(first_line(error), where="trainer") from error
    check_arguments(made)
    return made


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
    # The filter waits for the device at every batch, and hides that a training diverges.
    chosen["logging_nan_inf_filter"] = False
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


def _stopping_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's fields that keep the best checkpoint: evaluated whenever it is saved."""
    steps = given.get("eval_steps", given.get("save_steps"))
    asked = given.get("eval_strategy", given.get("save_strategy", "steps" if steps else "epoch"))
    every = {"eval_steps": steps, "save_steps": steps} if steps else {}
    return every | {
        "eval_strategy": asked,
        "save_strategy": asked,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }


def _generation_fields(setup: Setup) -> dict[str, Any]:
    """Return the trainer's fields that let an evaluation generate, if the task reads replies.

    A reply may be one token longer than the longest response, so that what goes on after a right
    one is seen.

    Raises:
        DataError: the tokenizer does not give the responses back.
    """
    if not setup.task.reads_replies:
        return {}
    reply_scores(setup)
    longest = max(len(ids) for ids in _responses(setup))
    # The token that the decoder starts from counts too.
    return {"predict_with_generate": True, "generation_max_length": longest + 2}


def reply_scores(setup: Setup) -> dict[str, float]:
    """Return the task's scores of the responses themselves: their names, and the best there is.

    Raises:
        DataError: the tokenizer does not give the responses back.
    """
    targets = setup.tokenizer.batch_decode(sorted(_responses(setup)), skip_special_tokens=True)
    return setup.task.reply_metrics(targets, targets)


def texts(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> list[str]:
    """Return the texts of token ids (rows x tokens, int, padded with -100 or the pad token)."""
    import numpy as np

    padded = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
    return tokenizer.batch_decode(padded, skip_special_tokens=True)


def _responses(setup: Setup) -> set[tuple[int, ...]]:
    """Return the different responses of all rows, as token ids."""
    rows = [setup.train, setup.held_out] if setup.held_out else [setup.train]
    return {tuple(ids) for part in rows for ids in part["labels"]}
