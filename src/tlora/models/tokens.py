"""Added tokens of a tokenizer, and their rows of the embedding and the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add special tokens; existing ones do not change."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([t for t in tokens if t not in known], special_tokens=True)


def make_rows(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Extend a model's embedding and head to the tokenizer's size; they are never shortened.

    New rows are drawn around the mean of the others, as in transformers.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def rows_of(model: Any, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Return PEFT's `trainable_token_indices` for the rows of ``tokens``, by the layer's full name.

    An untied head has its own rows. In PEFT, those of a tied head follow the embedding's.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding]
    if head is not None and head.weight is not embedding.weight:
        layers.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: list(tokens) for layer in layers}


def with_rows(options: Any, rows: Any) -> Any:
    """Return a method's options with trained ``rows`` of the embedding.

    Raises:
        ConfigError: the method trains no rows, or the options name others.
    """
    field = "trainable_token_indices"
    if not hasattr(options, field):
        raise ConfigError(
            "`tokens.add` needs a method that trains rows of the embedding, and this "
            "one does not; choose another method, or remove `tokens.add`.",
            where="method",
        )
    if getattr(options, field) is not None:
        raise ConfigError(
            f"`tokens.add` trains the tokens it adds, and `{field}` names others; give only one.",
            where="adapter",
        )
    return dataclasses.replace(options, **{field: rows})
