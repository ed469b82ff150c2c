"""Detect training rows that repeat evaluation prompts, and refuse or drop them.

The prompt of a row is everything before the response: its text or pair of texts without the label,
the user's turns of a chat, or all of a plain text. The paper's prompt around an instruction
is removed. A training row repeats an evaluation prompt if

- both prompts are equal after `tlora.tasks.normalize`, or
- its text contains every 13-gram of the prompt: inside another prompt, a plain text, a turn of a
  chat, or a response.

Prompts of fewer than 13 words and symbols, pairs, and rows with a label are only compared as a
whole: a sentence inside another one is a new classification sample.

Source: Brown et al. 2020 (arXiv 2005.14165), appendix C, where a single shared 13-gram is enough.
All of them are required here because problems from one textbook share many: with a single one,
2,852 of the 7,500 training rows of MATH would repeat test rows; only six do.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tlora.errors import DataError
from tlora.tasks.base import INSTRUCTION_PROMPT, Row, Task
from tlora.tasks.normalize import normalize

logger = logging.getLogger(__name__)

Prompt = str | tuple[str, ...]
"""A text, or the two texts of a pair in order."""
NGram = tuple[str, ...]

NGRAM = 13
_BEFORE, _AFTER = INSTRUCTION_PROMPT.split("{instruction}")
_SHOWN = 5


class PromptIndex:
    """Index of prompts that finds them as a whole and, if long, inside other texts.

    Example:
        >>> known = PromptIndex(["What is 2 + 2?"])
        >>> known.repeated_in("what is 2+2"), known.repeated_in("What is 2 - 2?")
        (True, False)
    """

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._whole = {_normalized(prompt) for prompt in prompts}
        long = [whole[0] for whole in self._whole if len(whole) == 1 and len(whole[0]) >= NGRAM]
        counts = Counter(gram for tokens in long for gram in set(_ngrams(tokens)))
        # Index each prompt by its rarest n-gram, so that template text is skipped.
        self._by_rarest: dict[NGram, list[NGram]] = defaultdict(list)
        for tokens in long:
            self._by_rarest[min(_ngrams(tokens), key=counts.__getitem__)].append(tokens)

    def repeated_in(self, prompt: Prompt, texts: Iterable[str] = ()) -> bool:
        """Return whether ``prompt`` or a part of one of the ``texts`` is in the index."""
        return _normalized(prompt) in self._whole or any(map(self._inside, texts))

    def _inside(self, text: str) -> bool:
        grams = set(_ngrams(normalize(text)))
        found = self._by_rarest.keys() & grams
        return any(grams.issuperset(_ngrams(p)) for gram in found for p in self._by_rarest[gram])


def prompt_of(row: Row) -> Prompt:
    """Return the prompt of a row, without the answer."""
    if "messages" in row:
        return "\n".join(_content(turn) for turn in row["messages"] if turn["role"] == "user")
    if "prompt" in row:
        prompt: str = row["prompt"]
        if prompt.startswith(_BEFORE) and _AFTER in prompt:
            # The rest is the start of a response.
            return prompt[len(_BEFORE) :].rpartition(_AFTER)[0]
        return prompt
    pair = row.get("text_pair")
    return row["text"] if pair is None else (row["text"], pair)


def overlapping_rows(
    rows: Sequence[Row], others: Mapping[str, PromptIndex], task: Task, name: str
) -> list[int]:
    """Return the indices of the training rows to drop, according to `data.overlap`.

    Args:
        rows: training rows, as ``task`` makes them.
        others: evaluation prompts, by their name in messages.
        task: its `data.overlap` refuses, drops or allows overlap.
        name: name of the training rows in messages.

    Raises:
        DataError: rows overlap and `data.overlap` is "refuse", or no row would remain.
    """
    places = {other: _repeating(rows, known, task) for other, known in others.items()}
    overlapping = sorted({index for found in places.values() for index in found})
    if not overlapping:
        return []
    counts = "; ".join(_sentence(found, other) for other, found in places.items() if found)
    text = f"{name}: of {len(rows)} training rows, {counts}"
    if task.data.overlap == "refuse":
        raise DataError(
            f"{text}; scores on those rows would be inflated by memorization: use --data.overlap"
            " drop to drop these training rows, or --data.overlap allow to train on them."
        )
    if task.data.overlap == "allow":
        logger.warning("%s; training uses them anyway.", text)
        return []
    logger.warning("%s; training skips them.", text)
    if len(overlapping) == len(rows):
        raise DataError(
            f"{name}: every training row repeats an evaluation row; use other training rows."
        )
    return overlapping


def refuse_overlap(
    rows: Sequence[Row], reported: tuple[str, PromptIndex], task: Task, name: str
) -> None:
    """Check that validation rows, used to choose a learning rate, repeat no reported prompt.

    Args:
        rows: validation rows, as ``task`` makes them.
        reported: name and prompts of the rows of the reported score.
        task: with `data.overlap` "allow", nothing is checked.
        name: name of the validation rows in messages.

    Raises:
        DataError: some rows do.
    """
    other, known = reported
    if task.data.overlap != "allow" and (found := _repeating(rows, known, task)):
        raise DataError(
            f"{name}: of {len(rows)} validation rows, {_sentence(found, other)}; rows that choose"
            " the learning rate cannot also report the score: remove them from one of the files."
        )


def _repeating(rows: Sequence[Row], known: PromptIndex, task: Task) -> list[int]:
    return [
        index
        for index, row in enumerate(rows)
        if known.repeated_in(prompt_of(row), [] if task.classifies else _texts(row))
    ]


def _texts(row: Row) -> list[str]:
    """Return the texts of a row that may contain an evaluation prompt."""
    if "label" in row:
        return []
    if "messages" in row:
        # Several user turns may together form one prompt.
        return ["\n".join(map(_content, row["messages"])), str(prompt_of(row))]
    return [f"{row['prompt']}\n{row['response']}" if "prompt" in row else row["text"]]


def _sentence(indices: Sequence[int], other: str) -> str:
    shown = ", ".join(str(index + 1) for index in indices[:_SHOWN])
    more = f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
    verb, rows = ("repeats", "row") if len(indices) == 1 else ("repeat", "rows")
    return f"{len(indices)} {verb} a prompt of {other} ({rows} {shown}{more})"


def _content(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn, or the text parts of a multimodal one."""
    content = turn.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _normalized(prompt: Prompt) -> tuple[NGram, ...]:
    texts = (prompt,) if isinstance(prompt, str) else prompt
    return tuple(tuple(normalize(text)) for text in texts)


def _ngrams(tokens: Sequence[str]) -> Iterable[NGram]:
    return zip(*(tokens[start:] for start in range(NGRAM)), strict=False)
