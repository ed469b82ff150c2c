"""Rows -> calibration batches, tokenized as training tokenizes them; needs no training extra."""

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
    """Draw ``n`` rows and make the batches that `calibrate` and `get_tlora_model` read.

    Rows are truncated, padded on the right and masked as `tlora train` does: in a prompt with a
    response, or a chat, only the response has labels; in plain text every token does.

    Example:
        >>> batches = calibration_batches(tokenizer, rows)
        >>> model = get_tlora_model(model, config, batches)

    Args:
        tokenizer: the model's; without a padding token its end-of-sequence token pads.
        rows: a sequence of dicts (a list, a `datasets.Dataset`), of which ``n`` are drawn, or any
            other iterable, whose first ``n`` are taken. Columns are found by name, as in a file
            given to `tlora train` (docs/data.md).
        n: how many rows, at most.
        batch_size: rows a batch; the statistics do not depend on it.
        seed: of the draw.
        **data: fields of `--data.*`: ``max_length`` (here 512 tokens, if not given), ``format``,
            ``loss_on``, ``prompt_template``, column names, and ``kind`` for other models than
            causal ones.

    Returns:
        Dicts of tensors, rows x tokens: "input_ids", "attention_mask", "labels" (int64; -100 where
        a token does not count), and what else the tokenizer gives the model.

    Raises:
        ConfigError: a field of ``data`` or a column is unknown.
        DataError: a row is not what its columns promise, no row is left with a token to learn from,
            or the tokenizer has no token to pad with.
    """
    chosen = _drawn(rows, n, seed)
    if not chosen:
        raise DataError("there are no rows to calibrate on; give at least one.")
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
    """Return the token ids and labels of the rows that have something to learn."""
    task = Jsonl(config)
    task.settle(tokenizer.chat_template is not None, None)
    task.settle_columns(list(rows[0]))
    encode = _ENCODE[task.kind]
    encoded = []
    for index, raw in enumerate(rows):
        where = f"calibration row {index + 1}"
        row = task.row(raw, where)
        try:
            encoded += tokens.encodings(encode, tokenizer, row, task.data)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    kept = [row for row in encoded if tokens.has_labels(row["labels"])]
    if not kept:
        cut = any(row.get(tokens.CUT) for row in encoded)
        raise DataError(
            f"none of {len(rows)} calibration rows has a token to learn from within"
            f" {task.data.max_length} tokens; raise max_length."
            if cut
            else f"none of {len(rows)} calibration rows has anything to learn: the responses are"
            " empty, or no assistant answers anybody."
        )
    return kept


def _padded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Return rows of different lengths as one batch, padded on the right."""
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
