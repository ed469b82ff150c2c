"""Training rows that ask what evaluation rows ask: found, counted, refused or dropped.

A model that was trained on the questions it is scored on has an answer to remember, so a run looks
before it starts. The question of a row is its prompt without the response, its text or pair of
texts without the label, what the user says of a chat, or the whole of a plain text. The paper's
prompt around an instruction is taken off.

Two questions are the same if their wording is (`tlora.tasks.wording`). A question of eight words or
more (and 24 letters and digits) is asked as well where it stands inside a longer text, word for
word (`tlora.tasks.passages`): within another prompt, a plain text, a turn of a chat or a response.
Rows with a label are compared as a whole alone, as a sentence within another is classified anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError
from tlora.tasks.base import INSTRUCTION_PROMPT, Row, Task
from tlora.tasks.passages import Passages, Texts
from tlora.tasks.wording import TOKEN, folded, letters

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Question = str | tuple[str, ...]
"""A text, or the texts of a pair in their order."""

_OPENING, _CLOSING = INSTRUCTION_PROMPT.split("{instruction}")
_SHOWN = 5
_PORTION_ROWS, _PORTION_LETTERS = 1000, 1 << 20


class Questions:
    """Questions to be recognised again: as a whole, and long ones inside other texts.

    Example:
        >>> known = Questions(["What is 2 + 2?"])
        >>> "what is 2+2" in known, "What is 2 - 2?" in known
        (True, False)
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        asked = set(questions)
        self._outlines: set[int] = set()
        self._digests: set[bytes] = set()
        for question in asked:
            texts = [folded(text) for text in _texts(question)]
            self._outlines.add(_outline(texts))
            self._digests.add(_digest(texts))
        self._passages = Passages(text for text in asked if isinstance(text, str))

    def __contains__(self, question: Question) -> bool:
        """Whether a question is the same as one of these, as a whole."""
        texts = [folded(text) for text in _texts(question)]
        # The outline costs a tenth of the digest, and rules out nearly every question.
        return _outline(texts) in self._outlines and _digest(texts) in self._digests

    def places(self, questions: Iterable[Question]) -> list[int]:
        """Return the places, from 0, of the ``questions`` that ask what one of these asks.

        They are the same as a whole, or a long one of these stands inside.
        """
        looked = ((asked, [asked] if isinstance(asked, str) else []) for asked in questions)
        return _places({"": self}, looked)[""]

    def among(self, questions: list[Question], texts: Texts, owners: list[int]) -> list[int]:
        """Return the places in ``questions`` of those that are asked.

        Args:
            questions: one of each row.
            texts: what the rows say, to be looked through for long questions.
            owners: of each of the ``texts``, the place of its row.
        """
        whole = {place for place, question in enumerate(questions) if question in self}
        return sorted(whole | {owners[place] for place in self._passages.places(texts)})


def questions(rows: Dataset, task: Task, name: str) -> Iterator[Question]:
    """Yield the question of each raw row; ``name`` is what error messages call the rows.

    Raises:
        DataError: a row is not what the task expects.
    """
    return map(question_of, _rows(rows, task, name))


def _rows(rows: Dataset, task: Task, name: str) -> Iterator[Row]:
    number = 0
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            raw = dict(zip(batch, values, strict=True))
            yield task.row(raw, f"{name}, row {number}")


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
    places = _askers(train, task, name, known)
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


def refuse_common(
    choosing: Mapping[str, Dataset | None], reported: Questions | None, task: Task, name: str
) -> None:
    """Check that rows which choose something ask nothing that is reported on.

    Args:
        choosing: raw validation rows, by what messages call them.
        reported: what the rows of the reported score ask, called ``name``.
        task: reads the rows; where its data say "allow", nothing is checked.

    Raises:
        DataError: some do; or a row is not what the task expects.
    """
    if reported is None or task.data.overlap == "allow":
        return
    for file, rows in choosing.items():
        if rows is None:
            continue
        if found := _askers(rows, task, file, {name: reported})[name]:
            raise DataError(
                f"{file}: of {len(rows)} validation rows {_sentence(found, name)}; what has chosen"
                " a learning rate cannot report on it: take these rows out of one of the files."
            )


def _askers(
    rows: Dataset, task: Task, name: str, known: Mapping[str, Questions]
) -> dict[str, list[int]]:
    """Return, by name, the places of the raw ``rows`` (called ``name``) that ask what is known."""
    read = _rows(rows, task, name)
    return _places(known, ((question_of(row), _said_in(row, task)) for row in read))


def _places(
    known: Mapping[str, Questions], rows: Iterable[tuple[Question, list[str]]]
) -> dict[str, list[int]]:
    """Return, by name, the places of the rows (question, all texts) that ask what is known."""
    found: dict[str, list[int]] = {name: [] for name in known}
    done = 0
    for portion in _portions(rows):
        asked = [question for question, _ in portion]
        texts = [text for _, said in portion for text in said]
        owners = [place for place, (_, said) in enumerate(portion) for _ in said]
        looked = Texts(texts)
        for name, questions in known.items():
            found[name] += [done + place for place in questions.among(asked, looked, owners)]
        done += len(portion)
    return found


def _portions(
    rows: Iterable[tuple[Question, list[str]]],
) -> Iterator[list[tuple[Question, list[str]]]]:
    """Yield the rows some at a time: few if they are long, as much is held for each letter."""
    portion: list[tuple[Question, list[str]]] = []
    size = 0
    for row in rows:
        portion.append(row)
        size += sum(map(len, row[1]))
        if len(portion) == _PORTION_ROWS or size > _PORTION_LETTERS:
            yield portion
            portion, size = [], 0
    yield portion


def _said_in(row: Row, task: Task) -> list[str]:
    """Return the texts of a row that may have a question of others inside."""
    if "label" in row or task.classifies:
        return []
    if "messages" in row:
        turns = row["messages"]
        said = ["\n".join(map(_said, turns))]
        # What a user says in several turns is one question.
        several = sum(turn["role"] == "user" for turn in turns) > 1
        return [*said, str(question_of(row))] if several else said
    if "prompt" in row:
        return [f"{row['prompt']}\n{row['response']}"]
    return [row["text"]]


def _sentence(places: list[int], other: str) -> str:
    shown = ", ".join(str(place + 1) for place in places[:_SHOWN])
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    rows = "row" if len(places) == 1 else "rows"
    return f"{len(places)} ask what {other} asks ({rows} {shown}{more})"


def _texts(question: Question) -> tuple[str, ...]:
    return (question,) if isinstance(question, str) else question


def _outline(texts: list[str]) -> int:
    """Return a hash of the letters and digits alone: the same for equal questions."""
    return hash(b"".join(map(letters, texts)))


def _digest(texts: list[str]) -> bytes:
    # A text that is nothing but marks is compared as it is.
    tokens = [" ".join(TOKEN.findall(text)) or text.strip() for text in texts]
    return hashlib.blake2b("\n".join(tokens).encode(), digest_size=16).digest()


def _said(turn: dict[str, Any]) -> str:
    """Return what a turn says; of parts, those that are text."""
    content = turn.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content)
    return str(content or "")
