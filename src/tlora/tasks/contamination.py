"""Training rows that ask what evaluation rows ask: found, counted, refused or dropped.

A model that was trained on the questions it is scored on has an answer to remember, so a run looks
before it starts. The question of a row is its prompt without the response, its text or pair of
texts without the label, what the user says of a chat, or the whole of a plain text. The paper's
prompt around an instruction is taken off.

Two questions are the same if their words and symbols are, in order, after Unicode's compatibility
form (NFKC) and casefolding. What does not count: white space, the marks ``. , ; : ! ? _``, quotes
and apostrophes, ellipses, dashes (also written --), and a hyphen between two letters. Every other
symbol counts: x - 5 and x + 5 are two questions.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError
from tlora.tasks.base import INSTRUCTION_PROMPT, Row, Task

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Question = str | tuple[str, ...]
"""A text, or the texts of a pair in their order."""

_LETTER = r"[^\W\d_]"
_MINUS = rf"(?<!-)(?<!{_LETTER})-(?!-)|(?<!-)-(?!-)(?!{_LETTER})"
_TOKEN = re.compile(rf"[^\W_]+|[^\w\s.,;:!?'\"`´‘’‚‛“”„«»…–—-]|{_MINUS}")  # noqa: RUF001
_OPENING, _CLOSING = INSTRUCTION_PROMPT.split("{instruction}")
_MARKS = bytes(byte for byte in range(128) if not chr(byte).isalnum())
_SHOWN = 5


class Questions:
    """Questions to be recognised again; of each a digest of 16 bytes is kept.

    Example:
        >>> known = Questions(["What is 2 + 2?"])
        >>> "what is 2+2" in known, "What is 2 - 2?" in known
        (True, False)
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        self._outlines: set[int] = set()
        self._digests: set[bytes] = set()
        for question in questions:
            texts = [_folded(text) for text in _texts(question)]
            self._outlines.add(_outline(texts))
            self._digests.add(_digest(texts))

    def __contains__(self, question: Question) -> bool:
        texts = [_folded(text) for text in _texts(question)]
        # The outline costs a tenth of the digest, and rules out nearly every question.
        return _outline(texts) in self._outlines and _digest(texts) in self._digests

    def places(self, questions: Iterable[Question]) -> list[int]:
        """Return the places, from 0, of the ``questions`` that are among these."""
        return [place for place, question in enumerate(questions) if question in self]


def questions(rows: Dataset, task: Task, name: str) -> Iterator[Question]:
    """Yield the question of each raw row; ``name`` is what error messages call the rows.

    Raises:
        DataError: a row is not what the task expects.
    """
    number = 0
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            raw = dict(zip(batch, values, strict=True))
            yield question_of(task.row(raw, f"{name}, row {number}"))


def question_of(row: Row) -> Question:
    """Return what a task's row asks, without the answer."""
    if "messages" in row:
        return "\n".join(_said(turn) for turn in row["messages"] if turn["role"] == "user")
    if "prompt" in row:
        prompt: str = row["prompt"]
        if prompt.startswith(_OPENING) and _CLOSING in prompt:
            # What follows is the beginning of a response.
            return prompt[len(_OPENING) :].rpartition(_CLOSING)[0]
        return prompt
    pair = row.get("text_pair")
    return row["text"] if pair is None else (row["text"], pair)


def keep_apart(
    train: Dataset, others: Mapping[str, Dataset | Questions | None], task: Task, name: str
) -> Dataset:
    """Return the training rows as `data.overlap` of the task wants them.

    Args:
        train: raw training rows.
        others: raw rows to be evaluated on, or what they ask, by what messages call them.
        task: reads both.
        name: what messages call the training rows.

    Raises:
        DataError: training rows ask what others ask and the task's data say "refuse"; or a row is
            not what the task expects; or no training row is left.
    """
    known = {
        other: rows if isinstance(rows, Questions) else Questions(questions(rows, task, other))
        for other, rows in others.items()
        if rows is not None
    }
    if not known:
        return train
    places: dict[str, list[int]] = {other: [] for other in known}
    for place, question in enumerate(questions(train, task, name)):
        for other, asked in known.items():
            if question in asked:
                places[other].append(place)
    found = "; ".join(_sentence(at, other) for other, at in places.items() if at)
    seen = {place for at in places.values() for place in at}
    if not seen:
        return train
    text = f"{name}: of {len(train)} training rows {found}"
    if task.data.overlap == "refuse":
        raise DataError(
            f"{text}; a score on those is no score of what is new: give --data.overlap drop to"
            " leave these training rows out, or --data.overlap allow to train on them."
        )
    if task.data.overlap == "allow":
        logger.warning("%s; they are trained on.", text)
        return train
    logger.warning("%s; they are left out of training.", text)
    if len(seen) == len(train):
        raise DataError(f"{name}: every training row is also an evaluation row; give other rows.")
    return train.select([place for place in range(len(train)) if place not in seen])


def _sentence(places: list[int], other: str) -> str:
    shown = ", ".join(str(place + 1) for place in places[:_SHOWN])
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    rows = "row" if len(places) == 1 else "rows"
    return f"{len(places)} ask what {other} asks ({rows} {shown}{more})"


def _texts(question: Question) -> tuple[str, ...]:
    return (question,) if isinstance(question, str) else question


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _outline(texts: list[str]) -> int:
    """Return a hash of the letters and digits alone: the same for equal questions."""
    text = "".join(texts).encode("ascii", "ignore")
    return hash(text.translate(None, _MARKS))


def _digest(texts: list[str]) -> bytes:
    # A text that is nothing but marks is compared as it is.
    tokens = [" ".join(_TOKEN.findall(text)) or text.strip() for text in texts]
    return hashlib.blake2b("\n".join(tokens).encode(), digest_size=16).digest()


def _said(turn: dict[str, Any]) -> str:
    """Return what a turn says; of parts, those that are text."""
    content = turn.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content)
    return str(content or "")
