"""Evaluating by generation: what the model replies is decoded, and read and scored by the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlora.tasks.tokens import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from tlora.training.setup import Setup


def generation_fields(setup: Setup) -> dict[str, Any]:
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
