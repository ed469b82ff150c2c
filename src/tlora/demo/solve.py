"""Exact match by generation: the model writes its answer, and the answer is right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 12,
    batch_size: int = 100,
) -> list[str]:
    """Return what the model writes greedily after each prompt, up to the end-of-text token.

    Prompts of a batch are padded on the left, so that all answers start at the same column.
    """
    import torch

    written: list[str] = []
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(
                list(prompts[start : start + batch_size]), padding=True, return_tensors="pt"
            ).to(model.device)
            batch.pop("token_type_ids", None)
            with torch.no_grad():
                tokens = model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            new = tokens[:, batch["input_ids"].shape[1] :]
            written += tokenizer.batch_decode(new, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
        model.train(training)
    return written


def exact_match(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]]
) -> float:
    """Return the share of rows whose response the model writes exactly, white space aside."""
    written = answers(model, tokenizer, [row["prompt"] for row in rows])
    right = sum(w.strip() == row["response"].strip() for w, row in zip(written, rows, strict=True))
    return right / len(rows)
