"""MT-Bench's questions and reference answers, in FastChat's files.

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
"""Sampling temperature of the answers by category, as published with the questions (FastChat)."""
OTHER_TEMPERATURE = 0.7
"""The same for any other category."""
NEEDS_REFERENCE = frozenset({"math", "reasoning", "coding"})
"""Categories that are judged beside a reference answer."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """Two turns of a user; the second is about the answer to the first."""

    id: str
    category: str
    turns: Pair
    references: Pair | None = None
    """What a right answer to each turn is, for the categories that need it."""

    @property
    def temperature(self) -> float:
        """The published temperature for the answers."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


def read_questions(
    rows: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[Question]:
    """Return the questions of the rows of FastChat's two files, in their order.

    Raises:
        DataError: a row is not a question or a reference answer, or a question that is judged
            beside a reference answer has none.
    """
    try:
        answers = {str(row["question_id"]): _pair(row["choices"][0]["turns"]) for row in references}
        asked = [(str(row["question_id"]), row["category"], _pair(row["turns"])) for row in rows]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"a row of MT-Bench's files has no question of two turns, or no answer to both"
            f" ({error!r}); take FastChat's files as they are."
        ) from error
    lacking = [name for name, group, _ in asked if group in NEEDS_REFERENCE and name not in answers]
    if lacking:
        raise DataError(
            f"there is no reference answer to the questions {', '.join(lacking)}, which are judged"
            " by one; take the file of references that belongs to the questions."
        )
    return [
        Question(name, group, turns, answers[name] if group in NEEDS_REFERENCE else None)
        for name, group, turns in asked
    ]


def _pair(turns: Any) -> Pair:
    first, second = turns
    return str(first), str(second)
