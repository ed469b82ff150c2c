"""Read MT-Bench's questions and reference answers from FastChat's files.

A line of the questions: {"question_id", "category", "turns": [first, second]}; of the references
(reference_answer/gpt-4.jsonl): {"question_id", "choices": [{"turns": [first, second]}]}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""Published sampling temperature of the answers by category (FastChat)."""
OTHER_TEMPERATURE = 0.7
"""Temperature for any other category."""
NEEDS_REFERENCE = frozenset({"math", "reasoning", "coding"})
"""Categories judged with a reference answer."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """Two turns of a user; the second is about the answer to the first."""

    id: str
    category: str
    turns: Pair
    references: Pair | None = None
    """Reference answers to both turns, for the categories that need them."""

    @property
    def temperature(self) -> float:
        """The published temperature for the answers."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


def read_questions(
    rows: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[Question]:
    """Return the questions in the rows of FastChat's two files, in order.

    Raises:
        DataError: a row is not a question or a reference answer, or a question lacks the reference
            answer it needs.
    """
    try:
        answers = {str(row["question_id"]): _pair(row["choices"][0]["turns"]) for row in references}
        asked = [(str(row["question_id"]), row["category"], _pair(row["turns"])) for row in rows]
        lacking = [
            name for name, group, _ in asked if group in NEEDS_REFERENCE and name not in answers
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"a row of MT-Bench's files lacks a question with two turns or answers to both"
            f" ({error!r}); use FastChat's original files."
        ) from error
    if lacking:
        raise DataError(
            f"the questions {', '.join(lacking)} need reference answers but have none; use the"
            " reference file that belongs to the questions."
        )
    return [
        Question(name, group, turns, answers[name] if group in NEEDS_REFERENCE else None)
        for name, group, turns in asked
    ]


def _pair(turns: Any) -> Pair:
    first, second = turns
    return str(first), str(second)
