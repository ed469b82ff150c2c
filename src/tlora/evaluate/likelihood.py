"""Score the rows of a task by the training loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from tlora.tasks.base import Row, Task
from tlora.tasks.rendering import turns
from tlora.tasks.tokens import CUT, IGNORED
from tlora.training.kinds import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 8


def likelihood(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: Task,
    batch_size: int | str,
) -> dict[str, float]:
    """Return {"-loss", "-perplexity"}: negatives, so that higher is better.

    The loss is the mean of -log p(token) over all tokens that training would use (the responses or
    assistant turns including their end, or all but the first token of a text), in nats and float32;
    perplexity is exp(loss).

    Args:
        model: in eval mode, on its device.
        tokenizer: its tokenizer, with the chat template for the rows.
        rows: of the task's kind, "causal" or "seq2seq".
        task: defines the tokenization.
        batch_size: rows per batch; "auto" means 8.
    """
    kind = KINDS[task.kind]
    parts = [part for row in rows for part in _parts(tokenizer, row)]
    encoded = [kind.encode(tokenizer, part, task.data) for part in parts]
    encoded.sort(key=lambda row: -len(row["input_ids"]))
    collate = kind.collator(tokenizer)
    size = batch_size if isinstance(batch_size, int) else _BATCH
    total, count = 0.0, 0
    for start in tqdm(range(0, len(encoded), size), desc="loss", disable=None):
        some = [{k: v for k, v in row.items() if k != CUT} for row in encoded[start : start + size]]
        for loss, tokens in _losses(model, dict(collate(some)), task.kind == "seq2seq"):
            total, count = total + loss, count + tokens
    loss = total / max(1, count)
    return {"-loss": -loss, "-perplexity": -math.exp(min(loss, 700.0))}


def _parts(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Row]:
    return turns(tokenizer, row) if "messages" in row else [row]


def _losses(model: Any, batch: dict[str, Any], decodes: bool) -> Iterator[tuple[float, int]]:
    """Yield the summed loss and the number of tokens of each row of a batch."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels = batch.pop("labels")  # some adapters cannot compute a loss outside training
    with torch.no_grad():
        if decodes:
            start = model.prepare_decoder_input_ids_from_labels(labels=labels)
            logits = model(**batch, decoder_input_ids=start).logits
        else:
            logits, labels = model(**batch).logits[:, :-1], labels[:, 1:]
        for row, wanted in zip(logits, labels, strict=True):
            counts = wanted != IGNORED
            found = torch.nn.functional.cross_entropy(
                row[counts].float(), wanted[counts], reduction="sum"
            )
            yield found.item(), int(counts.sum())
