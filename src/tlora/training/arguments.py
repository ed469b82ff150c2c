"""The training arguments: the user's fields, over our defaults, over the library's.

A task that reads replies is evaluated by generation: replies are decoded, parsed and scored.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.models.pretrained import load_class
from tlora.tasks.tokens import IGNORED
from tlora.training.availability import asked, chosen, made
from tlora.training.kinds import KindSpec

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from tlora.training.setup import Setup


def training_arguments(setup: Setup, output_dir: Path) -> Any:
    """Make the training arguments: the user's fields over our defaults over the library's.

    Ours: nothing is reported to a service; losses are logged unchanged; half precision and
    gradient checkpointing, which TRL turns on, stay off on a machine without an accelerator, where
    they only cost time; the processes of a launch communicate by gloo there. A task that reads
    replies is evaluated by generating them.

    Raises:
        ConfigError: transformers or TRL refuse a value (their message says why).
        DataError: replies are to be read, but the tokenizer does not restore the responses.
    """
    given = asked(setup.kind, setup.config)
    known = {field.name for field in dataclasses.fields(load_class(setup.kind.arguments))}
    fixed: dict[str, Any] = {"output_dir": str(output_dir), "seed": setup.config.seed}
    if "max_length" in known:
        # TRL requires None if it pads nothing; the rows are truncated already.
        unpadded = given.get("padding_free") and not given.get("packing")
        fixed["max_length"] = None if unpadded else setup.task.data.max_length
    if "dataset_kwargs" in known and not given.get("packing"):
        # The rows are already tokenized to the right length.
        fixed["dataset_kwargs"] = {"skip_prepare_dataset": True}
    return made(setup.kind, _generation_fields(setup) | given | fixed)


def defaults(kind: KindSpec) -> dict[str, Any]:
    """Return the default of each training argument in this run."""
    fields = dataclasses.fields(load_class(kind.arguments))
    return {field.name: field.default for field in fields} | chosen(
        {field.name: field for field in fields}, {}
    )


def _generation_fields(setup: Setup) -> dict[str, Any]:
    """Return the trainer's fields that make an evaluation generate, if the task reads replies.

    A reply may be one token longer than the longest response, so that text after a correct answer
    is detected.

    Raises:
        DataError: the tokenizer does not restore the responses.
    """
    if not setup.task.reads_replies:
        return {}
    reply_scores(setup)
    longest = max(len(ids) for ids in _responses(setup))
    # The decoder's start token counts too.
    return {"predict_with_generate": True, "generation_max_length": longest + 2}


def reply_scores(setup: Setup) -> dict[str, float]:
    """Return the names and best values of the task's scores, by scoring the responses themselves.

    Raises:
        DataError: the tokenizer does not restore the responses.
    """
    targets = setup.tokenizer.batch_decode(sorted(_responses(setup)), skip_special_tokens=True)
    return setup.task.reply_metrics(targets, targets)


def texts(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> list[str]:
    """Return the texts of token ids (rows x tokens, int, padded with -100 or the pad token)."""
    import numpy as np

    padded = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
    return tokenizer.batch_decode(padded, skip_special_tokens=True)


def _responses(setup: Setup) -> set[tuple[int, ...]]:
    """Return the distinct responses of all rows, as token ids."""
    rows = [setup.train, setup.held_out] if setup.held_out else [setup.train]
    return {tuple(ids) for part in rows for ids in part["labels"]}
