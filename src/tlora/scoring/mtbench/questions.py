"""MT-Bench's questions and reference answers, in FastChat's files.

A line of the questions: {"question_id", "category", "turns": [first, second]}; of the references
(reference_answer/gpt-4.jsonl): {"question_id", "choices": [{"turns": [first, second]}]}.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import DataError

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature of the answers by category, as published with the questions (FastChat)."""
OTHER_TEMPERATURE = 0.7
"""The same for any other category."""
NEEDS_REFERENCE = frozenset({"math", "reasoning", "coding"})
"""Categories that are judged beside a reference answer."""


@dataclass(frozen=True)
class Question:
    """Two turns of a user; the second is about the answer to the first."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None
    """What a right answer to each turn is, for the categories that need it."""


def published_temperature(question: Question) -> float:
    """Return the published temperature for the answers to a question."""
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""Raw rows, each with where it stands, for the message of an error."""


def read_questions(rows: Rows) -> list[Question]:
    """Return the questions of raw rows, in their order.

    Raises:
        DataError: a row is not such a question, or an id comes twice.
    """
    questions: dict[str, Question] = {}
    for where, row in rows:
        name, turns = _question_id(row, where), _pair(row.get("turns"))
        if turns is None or not isinstance(row.get("category"), str):
            raise DataError(
                f"{where}: a question has a `category` and `turns`, two texts; this one has"
                f" {', '.join(map(repr, row))}."
            )
        if name in questions:
            raise DataError(f"{where}: question {name} comes twice; drop one of them.")
        questions[name] = Question(name, row["category"], turns)
    return list(questions.values())


def with_references(questions: Sequence[Question], rows: Rows) -> list[Question]:
    """Return the questions with the reference answers of raw rows, where their category needs them.

    Raises:
        DataError: a row is not a reference answer, or a question lacks one.
    """
    found: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        try:
            turns = _pair(row["choices"][0]["turns"])
        except (KeyError, IndexError, TypeError):
            turns = None
        if turns is None:
            raise DataError(f"{where}: `choices` holds no answer to two turns; repair the file.")
        found[_question_id(row, where)] = turns
    needing = [q for q in questions if q.category in NEEDS_REFERENCE]
    if lacking := [q.id for q in needing if q.id not in found]:
        raise DataError(
            f"there is no reference answer to the questions {', '.join(lacking)}, which are judged"
            " by one; take the file of references that belongs to the questions."
        )
    return [
        dataclasses.replace(q, references=found[q.id]) if q.category in NEEDS_REFERENCE else q
        for q in questions
    ]


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSONL file, each with where it stands: "file, line n".

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object but {type(row).__name__}.")
        yield where, row


def _question_id(row: Mapping[str, Any], where: str) -> str:
    name = row.get("question_id")
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise DataError(f"{where}: `question_id` is {name!r}, not a number or a text.")
    return str(name)


def _pair(turns: Any) -> tuple[str, str] | None:
    if isinstance(turns, list) and len(turns) == 2 and all(isinstance(t, str) for t in turns):
        return turns[0], turns[1]
    return None
