"""Greedy replies: always the most likely token, regardless of a checkpoint's generation config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGINNING = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")


@contextmanager
def greedy(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Make `model.generate` decode greedily: no penalties, beams or minimum lengths.

    Only the checkpoint's start and end tokens are kept; its generation config is restored
    afterwards. Keyword arguments of `generate` take precedence.

    Args:
        model: a transformers model or a PeftModel.
        tokenizer: its tokenizer, whose closing token also ends a reply.
    """
    from transformers import GenerationConfig

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = bare.generation_config
    # `generate` reads missing arguments from here.
    bare.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=end_tokens(bare, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
        **{name: getattr(own, name, None) for name in _BEGINNING},
    )
    try:
        yield
    finally:
        bare.generation_config = own


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a reply: those of the model's generation config, and the
    tokenizer's, which closes responses."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    return [*dict.fromkeys(e for e in [*ends, tokenizer.eos_token_id] if e is not None)]
