"""Build calibration batches, tokenized as in training; needs no training extra."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlora.errors import ConfigError, DataError, unknown_names
from tlora.tasks import tokens
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl
from tlora.tasks.source import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 512
_ENCODE: dict[str, tokens.Encode] = {
    "causal": tokens.causal,
    "seq2seq": tokens.seq2seq,
    "classification": tokens.labeled,
    "regression": tokens.labeled,
}


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    n: int = 32,
    *,
    batch_size: int = 4,
    seed: int = 0,
    **data: Any,
) -> list[dict[str, Tensor]]:
    """Draw ``n`` rows and build batches for `calibrate` and `get_tlora_model`.

    Truncates, pads on the right and masks as `tlora train` does: in a prompt with a
    response, or a chat, only the response has labels; in plain text every token does.

    Example:
        >>> batches = calibration_batches(tokenizer, rows)
        >>> model = get_tlora_model(model, config, batches)

    Args:
        tokenizer: the model's tokenizer; pads with its padding token, else end-of-sequence.
        rows: a sequence of dicts (a list, a `datasets.Dataset`), from which ``n`` are drawn, or any
            other iterable, whose first ``n`` are taken. Columns are found by name, as in a file
            given to `tlora train` (docs/data.md).
        n: maximum number of rows.
        batch_size: rows per batch; the statistics do not depend on it.
        seed: of the random draw.
        **data: fields of `--data.*`: ``max_length`` (here 512 tokens, if not given), ``format``,
            ``loss_on``, ``prompt_template``, column names, and ``kind`` for non-causal
            models.

    Returns:
        Dicts of tensors, rows x tokens: "input_ids", "attention_mask", "labels" (int64; -100 where
        a token is not trained on), and any further inputs from the tokenizer.

    Raises:
        ConfigError: a field of ``data`` or a column is unknown.
        DataError: a row is malformed, no row has a trainable token,
            or the tokenizer has no token to pad with.
    """
    chosen = _drawn(rows, n, seed)
    if not chosen:
        raise DataError("there are no rows to calibrate on; pass at least one.")
    unknown = unknown_names(data, DataConfig.field_names(), "field")
    if faults := unknown or DataConfig(**data).faults():
        raise ConfigError(faults, where="calibration_batches")
    kept = _encoded(tokenizer, chosen, DataConfig(**{"max_length": _LONGEST, **data}))
    return [_padded(tokenizer, kept[i : i + batch_size]) for i in range(0, len(kept), batch_size)]


def _drawn(rows: Iterable[Mapping[str, Any]], n: int, seed: int) -> list[Mapping[str, Any]]:
    if n < 1:
        raise ConfigError(f"`n` is {n!r}; give a whole number, 1 or more.", "calibration_batches")
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        return list(itertools.islice(rows, n))
    sequence: Any = rows
    places = random.Random(seed).sample(range(len(sequence)), min(n, len(sequence)))
    return [sequence[place] for place in places]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], config: DataConfig
) -> list[dict[str, Any]]:
    """Return token ids and labels of the rows with at least one trainable token."""
    task = Jsonl(config)
    task.settle(tokenizer.chat_template is not None, None)
    task.settle_columns(list(rows[0]))
    encode = _ENCODE[task.kind]
    encoded = []
    for index, raw in enumerate(rows):
        where = f"calibration row {index + 1}"
        row = task.row(raw, where)
        check_whole(row, where)
        try:
            encoded += tokens.encodings(encode, tokenizer, row, task.data)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    kept = [row for row in encoded if tokens.has_labels(row["labels"])]
    if not kept:
        cut = any(row.get(tokens.CUT) for row in encoded)
        raise DataError(
            f"none of the {len(rows)} calibration rows has a token to train on within the first"
            f" {task.data.max_length} tokens; raise max_length."
            if cut
            else f"none of the {len(rows)} calibration rows has a token to train on: the responses"
            " are empty, or the chats have no assistant turn."
        )
    return kept


def _padded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Pad rows on the right into one batch."""
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    if pad is None:
        raise DataError("the tokenizer has no token to pad with; set its `pad_token`.")
    fill = {"input_ids": pad, "labels": tokens.IGNORED}
    rows = [{"attention_mask": [1] * len(row["input_ids"])} | dict(row) for row in rows]
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        if name == tokens.CUT:
            continue
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].ndim == 0:
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=fill.get(name, 0)
            )
    return batch
