"""Convert rows to token ids and labels, and provide the collators that pad batches.

Training and calibration both use these functions, so calibration sees exactly the tokens and labels
of training.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError
from tlora.files import scratch_folder
from tlora.tasks import mixture, rendering
from tlora.tasks.base import LONGEST, Row, Task
from tlora.tasks.dataconfig import DataConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that the loss ignores."""

_ANY = {"verbose": False}
"""Tokenize without a length warning: long rows are truncated and counted here."""

CUT = "cut"
"""Whether truncation removed trainable tokens; `tokenized` counts such rows."""

_SHOWN = 800
"""Maximum number of characters of the row shown."""

_IN_MEMORY = 2**15
"""Number of rows above which token ids are kept in a temporary file."""

# No cache: its key would be a pickle of the tokenizer, and a stale hit would go unnoticed.
_QUIET: dict[str, Any] = {"load_from_cache_file": False, "desc": "Tokenizing"}

Encode = Callable[["PreTrainedTokenizerBase", Row, DataConfig], dict[str, Any]]


def tokenized(
    raw: Dataset,
    rows: Sequence[Row],
    task: Task,
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Dataset:
    """Tokenize rows, dropping those without a trainable token.

    Warns with the number of dropped rows and of responses truncated at `data.max_length`.

    Args:
        raw: raw rows, as `task.load` returned them.
        rows: the same rows, converted by ``task``.
        task: its `data.max_length` limits rows.
        encode: tokenizes a row; one of the functions below.
        tokenizer: the model's tokenizer.
        name: name of the rows in messages: the file or dataset.

    Raises:
        DataError: no row is left, or the chat template rejects a row.
    """
    encoded = _encoded(raw, rows, task, encode, tokenizer, name)
    kept = encoded.filter(has_labels, input_columns="labels", **_QUIET)
    longest = task.data.max_length
    lost = len(encoded) - len(kept)
    if lost:
        cut = sum(encoded[CUT]) - sum(kept[CUT]) if CUT in encoded.column_names else 0
        _say_lost(name, len(encoded), lost - cut, cut, longest)
    return _counted(kept, name, longest)


def _say_lost(name: str, count: int, empty: int, cut: int, longest: int | None) -> None:
    """Warn about rows dropped because they have no trainable token.

    Args:
        name: name of the rows in messages.
        count: total number of rows.
        empty: rows with nothing to train on.
        cut: rows whose trainable tokens all lie beyond ``longest`` tokens.
        longest: `data.max_length`.

    Raises:
        DataError: no row is left.
    """
    if empty == count:
        raise DataError(
            f"{name}: no row has a token to train on: the responses are empty, or the chats have no"
            " assistant turn; check the columns, or use --data.loss_on all."
        )
    if empty + cut == count:
        raise DataError(
            f"{name}: no row has a token to train on within {longest} tokens; shorten the rows,"
            " or raise --data.max_length if the model supports it."
        )
    if empty:
        logger.warning(
            "%s: skipping %d of %d rows with nothing to train on (an empty response).",
            name,
            empty,
            count,
        )
    if cut:
        logger.warning(
            "%s: skipping %d of %d rows without a token to train on within %d tokens.",
            name,
            cut,
            count,
            longest,
        )


def show(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], name: str) -> None:
    """Log a row with its trainable part marked; skip a row with a label."""
    if isinstance(row["labels"], list) and len(row["labels"]) == len(row["input_ids"]):
        text = marked(tokenizer, row["input_ids"], row["labels"]).replace("\n", "\\n")
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        logger.info("%s: example row, with trained tokens in «»: %s", name, text)


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Return the text of a row with its trained tokens in «»."""
    groups = itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED)
    texts = [(learned, tokenizer.decode([token for token, _ in part])) for learned, part in groups]
    return "".join(f"«{text}»" if learned else text for learned, text in texts)


def has_labels(labels: Any) -> bool:
    """Return whether a row has a training target: a class, a number, or a token with a label."""
    return not isinstance(labels, list) or any(label != IGNORED for label in labels)


def _encoded(
    raw: Dataset,
    rows: Sequence[Row],
    task: Task,
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Dataset:
    import numpy as np
    from datasets.fingerprint import Hasher

    def column(values: list[Any]) -> list[Any]:
        lists = isinstance(values[0], list)  # `datasets` would store 8 bytes a label
        return [np.array(value, dtype=np.int32) for value in values] if lists else values

    def some(_: dict[str, Any], indices: list[int]) -> dict[str, list[Any]]:
        found = []
        for index in indices:
            try:
                found += encodings(encode, tokenizer, rows[index], task.data)
            except DataError as error:
                where = mixture.place(raw, name, index)
                raise DataError(f"{where}: {error}") from error
        return {field: column([row[field] for row in found]) for field in found[0]}

    # `datasets` names its file by this, and would otherwise hash all rows.
    mark = Hasher.hash((raw._fingerprint, task, encode, tokenizer))
    return raw.with_format(None).map(
        some,
        batched=True,
        with_indices=True,
        remove_columns=raw.column_names,
        new_fingerprint=mark,
        cache_file_name=f"{scratch_folder()}/{mark}.arrow" if len(rows) > _IN_MEMORY else None,
        **_QUIET,
    )


def encodings(
    encode: Encode, tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig
) -> list[dict[str, Any]]:
    """Tokenize a row; a chat whose template rewrites earlier turns yields several.

    Raises:
        DataError: the chat template rejects the row.
    """
    chat = "messages" in row and data.loss_on == "response"
    parts = rendering.turns(tokenizer, row) if chat else [row]
    return [encode(tokenizer, part, data) for part in parts]


def _counted(rows: Dataset, name: str, longest: int | None) -> Dataset:
    """Warn about truncated rows, and return ``rows`` without the column that marks them."""
    if CUT not in rows.column_names:
        return rows
    if cut := sum(rows[CUT]):
        logger.warning(
            "%s: the responses of %d of %d rows are truncated at `data.max_length`, %d tokens;"
            " raise --data.max_length.",
            name,
            cut,
            len(rows),
            longest,
        )
    return rows.remove_columns(CUT)


def causal(tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig) -> dict[str, Any]:
    """Return {"input_ids", "labels", "cut"} for a prompt with its response, a chat or plain text.

    Tokenizes prompt and response separately and joins them, so the prompt has the same tokens as
    in generation. The response ends with the EOS token, which is trained on. With `data.loss_on`
    "response" all other labels are `IGNORED`. "cut" tells whether trainable tokens lie beyond
    `data.max_length`.
    """
    if "messages" in row:
        ids, learned = _chat(tokenizer, row, masked=data.loss_on == "response")
    elif "text" in row:
        ids = _once_begun(tokenizer, tokenizer(row["text"], **_ANY)["input_ids"])
        ids += _end(tokenizer, ids)
        learned = [True] * len(ids)
    else:
        prompt = [*prompt_ids(tokenizer, row["prompt"])]
        response = [*tokenizer(row["response"], add_special_tokens=False, **_ANY)["input_ids"]]
        response += _end(tokenizer, response)
        ids = prompt + response
        learned = [False] * len(prompt) + [True] * len(response)
    if data.loss_on == "all":
        learned = [True] * len(ids)
    labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
    longest = data.max_length or len(ids)
    return {
        "input_ids": ids[:longest],
        "labels": labels[:longest],
        CUT: any(label != IGNORED for label in labels[longest:]),
    }


def seq2seq(tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig) -> dict[str, Any]:
    """Return the encoder's "input_ids" and "attention_mask", and the decoder's "labels".

    "cut" tells whether the response is longer than `data.max_length`.
    """
    short = {"truncation": True, "max_length": data.max_length or LONGEST}
    encoded = tokenizer(row["prompt"], **short)
    labels = tokenizer(text_target=row["response"], **_ANY)["input_ids"]
    cut = len(labels) > short["max_length"]
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        # The tokenizer truncates, as it knows how a text has to end.
        "labels": tokenizer(text_target=row["response"], **short)["input_ids"] if cut else labels,
        CUT: cut,
    }


def labeled(tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig) -> dict[str, Any]:
    """Return the model's inputs for one or two texts, and the label as "labels"."""
    longest = data.max_length or LONGEST
    encoded = tokenizer(row["text"], row["text_pair"], truncation=True, max_length=longest)
    return {**encoded, "labels": row["label"]}


def causal_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Mapping[str, Any]]:
    """Return TRL's collator, which pads on the right and masks the padding's labels."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)


def seq2seq_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Mapping[str, Any]]:
    """Return transformers' collator for source and target."""
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def labeled_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Mapping[str, Any]]:
    """Return transformers' collator that pads the inputs and stacks the labels."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return the EOS token, unless there is none or the ids already end with it."""
    end = tokenizer.eos_token_id
    return [] if end is None or (ids and ids[-1] == end) else [end]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokenize with the opening special tokens but no closing one."""
    ids = _once_begun(tokenizer, tokenizer(prompt, **_ANY)["input_ids"])
    closed = tokenizer.eos_token_id is not None and ids and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closed else ids


def _once_begun(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Return token ids without a duplicate BOS token, which both text and tokenizer may add."""
    begin = tokenizer.bos_token_id
    doubled = begin is not None and [*ids[:2]] == [begin, begin]
    return [*ids[1:]] if doubled else [*ids]


def _chat(
    tokenizer: PreTrainedTokenizerBase, row: Row, masked: bool
) -> tuple[list[int], list[bool]]:
    """Render a chat with the tokenizer's template; if ``masked``, train only on the assistant."""
    if masked:
        text, spans = rendering.rendered(tokenizer, row)
    else:
        text = rendering.written(tokenizer, row)
        spans = [(0, len(text))]
    # The template writes the BOS token if the model needs one.
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, **_ANY)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        return ids, [any(a <= i and j <= b and i < b for a, b in spans) for i, j in places]
    ids = tokenizer(text, add_special_tokens=False, **_ANY)["input_ids"]
    learned = [False] * len(ids)
    for a, b in spans:
        start, end = (_shared(tokenizer, text[:place], ids) for place in (a, b))
        learned[start:end] = [True] * (end - start)
    return ids, learned


def _shared(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> int:
    """Return how many tokens the start of a text shares with the whole text."""
    own = tokenizer(text, add_special_tokens=False, **_ANY)["input_ids"]
    pairs = enumerate(zip(own, ids, strict=False))
    return next((place for place, (a, b) in pairs if a != b), len(own))
