"""Tokens that are added to a tokenizer, and their rows of the embedding and the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add special tokens; those that it has already stay as they are."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([t for t in tokens if t not in known], special_tokens=True)


def make_rows(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lengthen a model's embedding and head to the tokenizer's tokens; they are never shortened.

    New rows are drawn around the mean of the others, as transformers does it.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def rows_of(model: Any, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Return PEFT's `trainable_token_indices` for the rows of ``tokens``, by the layer's full name.

    An untied head has rows of its own. Those of a tied one follow the embedding's in PEFT.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding]
    if head is not None and head.weight is not embedding.weight:
        layers.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: list(tokens) for layer in layers}


def with_rows(options: Any, rows: Any) -> Any:
    """Return a method's options with ``rows`` of the embedding to train.

    Raises:
        ConfigError: the method trains no rows, or the options name others.
    """
    field = "trainable_token_indices"
    if not hasattr(options, field):
        raise ConfigError(
            "`tokens.add` needs a method that trains rows of the embedding, and this one does not;"
            " choose another, or add no tokens.",
            where="method",
        )
    if getattr(options, field) is not None:
        raise ConfigError(
            f"`tokens.add` trains the tokens it adds, and `{field}` names others; give one of"
            " them.",
            where="adapter",
        )
    return dataclasses.replace(options, **{field: rows})
