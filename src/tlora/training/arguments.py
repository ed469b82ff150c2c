"""The training arguments: what the user gave, over our defaults, over the library's.

A task that reads replies is evaluated by generating: replies are decoded, read and scored by it.
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

    Ours: nothing is reported to a service; losses are logged as they are; half precision and
    gradient checkpointing, which TRL turns on, stay off on a machine without an accelerator, where
    they only cost; the ranks of a launch talk by gloo there. A task that reads replies is evaluated
    by generating them.

    Raises:
        ConfigError: transformers or TRL refuse a value (their sentence says why).
        DataError: replies are to be read, and the tokenizer does not give the responses back.
    """
    given = asked(setup.kind, setup.config)
    known = {field.name for field in dataclasses.fields(load_class(setup.kind.arguments))}
    fixed: dict[str, Any] = {"output_dir": str(output_dir), "seed": setup.config.seed}
    if "max_length" in known:
        # TRL wants none where it pads nothing; the rows are cut already.
        unpadded = given.get("padding_free") and not given.get("packing")
        fixed["max_length"] = None if unpadded else setup.task.data.max_length
    if "dataset_kwargs" in known and not given.get("packing"):
        # The rows are tokens of the right length already.
        fixed["dataset_kwargs"] = {"skip_prepare_dataset": True}
    return made(setup.kind, _generation_fields(setup) | given | fixed)


def defaults(kind: KindSpec) -> dict[str, Any]:
    """Return the value of each training argument that holds here where the user gives none."""
    fields = dataclasses.fields(load_class(kind.arguments))
    return {field.name: field.default for field in fields} | chosen(
        {field.name: field for field in fields}, {}
    )


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
