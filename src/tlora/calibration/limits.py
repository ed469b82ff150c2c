"""Capacity limits of a model: positions in its table, and rows of its embedding."""

from __future__ import annotations

from typing import Any

from torch import nn

from tlora.calibration.language_model import language_model

_TABLES = ("wpe", "embed_positions", "position_embedding", "position_embeddings")


def table_of_positions(model: Any) -> int | None:
    """Return the number of tokens that a model's table of positions holds; None without a table.

    Some tables reserve rows in front (OPT, BART: two; RoBERTa: up to the padding id).
    """
    _, body = language_model(model) or ("", model)
    found = []
    for name, module in body.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            padding = getattr(module, "padding_idx", None)
            front = getattr(module, "offset", 0) if padding is None else padding + 1
            found.append(module.num_embeddings - front)
    return min(found, default=None)


def within_positions(model: Any, longest: int) -> int:
    """Return ``longest``, or the size of the model's table of positions if that is less."""
    return min(longest, table_of_positions(model) or longest)


def fault_of_ids(model: Any, longest: int, largest: int) -> str | None:
    """Return which tokens do not fit a model, as the end of a sentence; None if all fit.

    Args:
        model: a transformers model.
        longest: tokens of the longest row.
        largest: the largest token id.
    """
    kind, room = type(model).__name__, table_of_positions(model)
    if room is not None and longest > room:
        return f"{longest} tokens, and {kind} has {room} positions; set `max_length` to {room}"
    rows = _rows(model)
    if rows is not None and largest >= rows:
        return (
            f"the token id {largest}, and the embedding of {kind} has {rows} rows; use the model's"
            " own tokenizer, or resize the embedding (`tokens.add`, `resize_token_embeddings`)"
        )
    return None


def _rows(model: Any) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)
