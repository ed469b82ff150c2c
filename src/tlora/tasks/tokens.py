"""Rows -> token ids and labels, and the collator that pads them into a batch.

Training and calibration both read what these functions return, so that the statistics are of
the very tokens and labels that are trained on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError
from tlora.tasks import mixture, rendering
from tlora.tasks.base import LONGEST, Row, Task
from tlora.tasks.dataconfig import DataConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that does not count in the loss."""

_ANY = {"verbose": False}
"""Text of any length is tokenized without a warning: what is too long is cut and counted here."""

CUT = "cut"
"""Whether something that is to be learned was cut off a row; `tokenized` counts it."""

_SHOWN = 800
"""Characters of the row that is shown."""

# No cache: the cache's key would be a pickle of the tokenizer, and a stale hit would be silent.
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
    """Turn rows into token ids; rows left without a token to learn from are dropped.

    Those, and the rows whose response is cut at `data.max_length`, are counted in a warning each.

    Args:
        raw: raw rows, as `task.load` returned them.
        rows: what ``task`` made of them.
        task: its data say how long a row may be.
        encode: makes token ids of a row; one of the functions below.
        tokenizer: the model's.
        name: what messages call the rows: the file or dataset.

    Raises:
        DataError: no row is left, or a chat template refuses a row.
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
    """Say how many rows are left out for want of a token to learn from.

    Args:
        name: what messages call the rows.
        count: rows in all.
        empty: those in which nothing is to be learned.
        cut: those in which it lies beyond ``longest`` tokens.
        longest: `data.max_length`.

    Raises:
        DataError: no row is left.
    """
    if empty == count:
        raise DataError(
            f"{name}: no row has anything to learn: the responses are empty, or no assistant"
            " answers anybody; look at the columns, or give --data.loss_on all."
        )
    if empty + cut == count:
        raise DataError(
            f"{name}: no row has a token to learn from within {longest} tokens; shorten the rows,"
            " or raise --data.max_length where the model holds more."
        )
    if empty:
        logger.warning(
            "%s: %d of %d rows have nothing to learn (an empty response) and are left out.",
            name,
            empty,
            count,
        )
    if cut:
        logger.warning(
            "%s: %d of %d rows have no token to learn from within %d tokens and are left out.",
            name,
            cut,
            count,
            longest,
        )


def show(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], name: str) -> None:
    """Log a row as it is trained on, with what of it is learned; one with a label is not shown."""
    if isinstance(row["labels"], list) and len(row["labels"]) == len(row["input_ids"]):
        text = marked(tokenizer, row["input_ids"], row["labels"]).replace("\n", "\\n")
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        logger.info("%s: a row as it is trained on, what is learned in «»: %s", name, text)


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Return the text of a row with what is learned of it in «»."""
    groups = itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED)
    texts = [(learned, tokenizer.decode([token for token, _ in part])) for learned, part in groups]
    return "".join(f"«{text}»" if learned else text for learned, text in texts)


def has_labels(labels: Any) -> bool:
    """Return whether a row has something to learn: a class, a number, or a token with a label."""
    return not isinstance(labels, list) or any(label != IGNORED for label in labels)


def _encoded(
    raw: Dataset,
    rows: Sequence[Row],
    task: Task,
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Dataset:
    from datasets.fingerprint import Hasher

    def some(_: dict[str, Any], indices: list[int]) -> dict[str, list[Any]]:
        found = []
        for index in indices:
            try:
                found += encodings(encode, tokenizer, rows[index], task.data)
            except DataError as error:
                where = mixture.place(raw, name, index)
                raise DataError(f"{where}: {error}") from error
        return {field: [row[field] for row in found] for field in found[0]}

    # `datasets` names its file by this, and would else hash all rows.
    mark = Hasher.hash((raw._fingerprint, task, encode, tokenizer))
    return raw.with_format(None).map(
        some,
        batched=True,
        with_indices=True,
        remove_columns=raw.column_names,
        new_fingerprint=mark,
        **_QUIET,
    )


def encodings(
    encode: Encode, tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig
) -> list[dict[str, Any]]:
    """Return the token ids of a row; a chat whose template rewrites earlier turns gives several.

    Raises:
        DataError: a chat template refuses the row.
    """
    chat = "messages" in row and data.loss_on == "response"
    parts = rendering.turns(tokenizer, row) if chat else [row]
    return [encode(tokenizer, part, data) for part in parts]


def _counted(rows: Dataset, name: str, longest: int | None) -> Dataset:
    """Return ``rows`` without the column that says which are cut, after saying how many are."""
    if CUT not in rows.column_names:
        return rows
    if cut := sum(rows[CUT]):
        logger.warning(
            "%s: %d of %d rows are longer than `data.max_length`, %d tokens, and lose the end of"
            " their response; raise --data.max_length.",
            name,
            cut,
            len(rows),
            longest,
        )
    return rows.remove_columns(CUT)


def causal(tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig) -> dict[str, Any]:
    """Return {"input_ids", "labels", "cut"} of a prompt with its response, a chat or a plain text.

    Prompt and response are tokenized apart and joined, so the prompt's tokens are those that
    generation will start from. The end-of-sequence token closes the response and is learned.
    With `data.loss_on` "response" the labels of everything else are `IGNORED`. "cut" says whether
    what lies beyond `data.max_length` was to be learned.
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

    "cut" says whether the response is longer than `data.max_length`.
    """
    short = {"truncation": True, "max_length": data.max_length or LONGEST}
    encoded = tokenizer(row["prompt"], **short)
    labels = tokenizer(text_target=row["response"], **_ANY)["input_ids"]
    cut = len(labels) > short["max_length"]
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        # Cut by the tokenizer, which knows what a text has to end in.
        "labels": tokenizer(text_target=row["response"], **short)["input_ids"] if cut else labels,
        CUT: cut,
    }


def labeled(tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig) -> dict[str, Any]:
    """Return the model's inputs of a text or a pair of texts, and its label as "labels"."""
    longest = data.max_length or LONGEST
    encoded = tokenizer(row["text"], row["text_pair"], truncation=True, max_length=longest)
    return {**encoded, "labels": row["label"]}


def causal_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Mapping[str, Any]]:
    """Return TRL's collator: pads right, masks the padding's labels."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)


def seq2seq_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Mapping[str, Any]]:
    """Return transformers' collator of source and target."""
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def labeled_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Mapping[str, Any]]:
    """Return transformers' collator that pads the inputs and stacks the labels."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return the end-of-sequence token, unless there is none or it is there already."""
    end = tokenizer.eos_token_id
    return [] if end is None or (ids and ids[-1] == end) else [end]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokenize with the opening special tokens, without a closing one."""
    ids = _once_begun(tokenizer, tokenizer(prompt, **_ANY)["input_ids"])
    closed = tokenizer.eos_token_id is not None and ids and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closed else ids


def _once_begun(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Return token ids without a second opening token: the text has one, the tokenizer's too."""
    begin = tokenizer.bos_token_id
    doubled = begin is not None and [*ids[:2]] == [begin, begin]
    return [*ids[1:]] if doubled else [*ids]


def _chat(
    tokenizer: PreTrainedTokenizerBase, row: Row, masked: bool
) -> tuple[list[int], list[bool]]:
    """Render a chat by the tokenizer's template; if ``masked``, only the assistant is learned."""
    if masked:
        text, spans = rendering.rendered(tokenizer, row)
    else:
        text = rendering.written(tokenizer, row)
        spans = [(0, len(text))]
    # The template writes the opening token, if the model wants one.
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
    """Return how many tokens the beginning of a text shares with the whole."""
    own = tokenizer(text, add_special_tokens=False, **_ANY)["input_ids"]
    pairs = enumerate(zip(own, ids, strict=False))
    return next((place for place, (a, b) in pairs if a != b), len(own))
