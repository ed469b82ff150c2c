"""Rows -> token ids and labels, and the collator that pads them into a batch.

Training and calibration both read what these functions return, so that the statistics are of
the very tokens and labels that are trained on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError
from tlora.tasks.base import Row, Task
from tlora.tasks.dataconfig import DataConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that does not count in the loss."""

CUT = "cut"
"""Whether something that is to be learned was cut off a row; `tokenized` counts it."""

# No cache: the cache's key would be a pickle of the tokenizer, and a stale hit would be silent.
_QUIET: dict[str, Any] = {"load_from_cache_file": False, "desc": "Tokenizing"}

_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
"""What opens the assistant's turn in a chat template that can be trained on."""

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
        DataError: no row is left.
    """
    encoded = _encoded(raw, rows, task, encode, tokenizer)
    kept = encoded.filter(has_labels, input_columns="labels", **_QUIET)
    longest = task.data.max_length
    if len(kept) == 0:
        raise DataError(
            f"{name}: no row has a token to learn from within {longest} tokens; raise"
            " --data.max_length."
        )
    if len(kept) < len(encoded):
        logger.warning(
            "%s: %d of %d rows have no token to learn from within %d tokens and are left out.",
            name,
            len(encoded) - len(kept),
            len(encoded),
            longest,
        )
    return _counted(kept, name, longest)


def has_labels(labels: Any) -> bool:
    """Return whether a row has something to learn: a class, a number, or a token with a label."""
    return not isinstance(labels, list) or any(label != IGNORED for label in labels)


def _encoded(
    raw: Dataset,
    rows: Sequence[Row],
    task: Task,
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    from datasets.fingerprint import Hasher

    def one(_: dict[str, Any], index: int) -> dict[str, Any]:
        return encode(tokenizer, rows[index], task.data)

    # `datasets` names its file by this, and would else hash all rows.
    mark = Hasher.hash((raw._fingerprint, task, encode, tokenizer))
    columns = raw.column_names
    return raw.map(one, with_indices=True, remove_columns=columns, new_fingerprint=mark, **_QUIET)


def _counted(rows: Dataset, name: str, longest: int) -> Dataset:
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
        ids, learned = _chat(tokenizer, row["messages"], masked=data.loss_on == "response")
    elif "text" in row:
        ids = [*tokenizer(row["text"])["input_ids"]]
        ids += _end(tokenizer, ids)
        learned = [True] * len(ids)
    else:
        prompt = [*prompt_ids(tokenizer, row["prompt"])]
        response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"]]
        response += _end(tokenizer, response)
        ids = prompt + response
        learned = [False] * len(prompt) + [True] * len(response)
    if data.loss_on == "all":
        learned = [True] * len(ids)
    labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
    return {
        "input_ids": ids[: data.max_length],
        "labels": labels[: data.max_length],
        CUT: any(label != IGNORED for label in labels[data.max_length :]),
    }


def seq2seq(tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig) -> dict[str, Any]:
    """Return the encoder's "input_ids" and "attention_mask", and the decoder's "labels".

    "cut" says whether the response is longer than `data.max_length`.
    """
    short = {"truncation": True, "max_length": data.max_length}
    encoded = tokenizer(row["prompt"], **short)
    labels = tokenizer(text_target=row["response"])["input_ids"]
    cut = len(labels) > data.max_length
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        # Cut by the tokenizer, which knows what a text has to end in.
        "labels": tokenizer(text_target=row["response"], **short)["input_ids"] if cut else labels,
        CUT: cut,
    }


def labeled(tokenizer: PreTrainedTokenizerBase, row: Row, data: DataConfig) -> dict[str, Any]:
    """Return the model's inputs of a text or a pair of texts, and its label as "labels"."""
    encoded = tokenizer(row["text"], row["text_pair"], truncation=True, max_length=data.max_length)
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
    ids = tokenizer(prompt)["input_ids"]
    closed = tokenizer.eos_token_id is not None and ids and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closed else ids


def _chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], masked: bool
) -> tuple[list[int], list[bool]]:
    """Render a chat by the tokenizer's template; if ``masked``, only the assistant is learned."""
    if tokenizer.chat_template is None:
        raise DataError(
            "the model's tokenizer has no chat template; use a chat model, or rows with a prompt"
            " and a response."
        )
    encoded = tokenizer.apply_chat_template(
        messages,
        chat_template=_marked_template(tokenizer) if masked else None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=masked,
    )
    ids = [*encoded["input_ids"]]
    return ids, [bool(bit) for bit in encoded.get("assistant_masks", [1] * len(ids))]


def _marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a template that marks the assistant's turns; None: the tokenizer's own does.

    Raises:
        DataError: no template that marks the turns is known for this tokenizer.
    """
    if _MARKED.search(tokenizer.get_chat_template()):
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer)
    except (ImportError, ValueError) as error:
        known = 'run `pip install "tlora[train]"`: trl may know one that does; or '
        raise DataError(
            "the tokenizer's chat template does not mark what the assistant says, so the loss"
            f" cannot be put on it; {known if isinstance(error, ImportError) else ''}add"
            " {% generation %} to the template, or give --data.loss_on all."
        ) from error
