"""Grades as kept, a line for each turn with all that a later judging needs, and their means.

Source: FastChat's summary of single-answer grades, published with arXiv 2306.05685: means over
answers, those without a grade left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tlora.errors import ArtifactError
from tlora.scoring.mtbench.judging import TURNS, Answered, Judged, Judgement
from tlora.scoring.mtbench.questions import Question

_TEXTS = ("reply", "rendered")
MAIN = "score"


def grade_names(question: Question, turn: int) -> tuple[str, ...]:
    """Return the names of the means that the grade of one answer counts in."""
    return (MAIN, f"turn_{turn}", question.category)


def metric_names(answered: Sequence[Answered]) -> list[str]:
    """Return the names of the scores: all answers, each turn, each category in the file's order."""
    names = [(grade_names(each.question, turn)) for each in answered for turn in TURNS]
    return list(dict.fromkeys(name for column in zip(*names, strict=True) for name in column))


def means(answered: Sequence[Answered], judged: Judged) -> dict[str, float]:
    """Return the mean grade under each name of `metric_names`, 1 to 10.

    A name whose answers have all been left unrated is left out.
    """
    grades: dict[str, list[float]] = {name: [] for name in metric_names(answered)}
    for each, pair in zip(answered, judged.judgements, strict=True):
        for turn, judgement in zip(TURNS, pair, strict=True):
            if judgement.score is not None:
                for name in grade_names(each.question, turn):
                    grades[name].append(judgement.score)
    return {name: math.fsum(some) / len(some) for name, some in grades.items() if some}


def to_lines(answered: Sequence[Answered], judged: Judged | None = None) -> list[dict[str, Any]]:
    """Return two lines a question; their scores are empty where there is no grade (yet)."""
    lines = []
    for place, each in enumerate(answered):
        pair = judged.judgements[place] if judged else (None, None)
        for turn, judgement in zip(TURNS, pair, strict=True):
            lines.append(_line(each, turn, judgement))
    return lines


def _line(each: Answered, turn: int, judgement: Judgement | None) -> dict[str, Any]:
    question, at = each.question, turn - 1
    line: dict[str, Any] = {
        "item": f"{question.id}/{turn}",
        "group": question.id,
        "prompt": question.turns[at],
        "reply": each.answers[at],
        "answer": None,
        "target": question.references[at] if question.references else None,
        "scores": {},
        "turn": turn,
        "category": question.category,
        "rendered": each.prompts[at],
    }
    if judgement is not None:
        line |= {"judgement": judgement.reply.text, "status": judgement.status}
        if judgement.score is not None:
            line["scores"] = dict.fromkeys(grade_names(question, turn), judgement.score)
    return line


def from_lines(lines: Iterable[Mapping[str, Any]], where: str) -> list[Answered]:
    """Return the questions and answers that `to_lines` wrote.

    Args:
        lines: the lines, in order.
        where: the file, for the message of an error.

    Raises:
        ArtifactError: a line is missing or is not such a line.
    """
    rows = list(lines)
    try:
        return [_answered(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: these are no answers to MT-Bench ({error!r}).") from error


def _answered(first: Mapping[str, Any], second: Mapping[str, Any]) -> Answered:
    if (first["turn"], second["turn"]) != TURNS or first["group"] != second["group"]:
        raise ValueError(f"{first['item']} and {second['item']} are not two turns of a question")
    targets = (first["target"], second["target"])
    question = Question(
        first["group"],
        first["category"],
        (first["prompt"], second["prompt"]),
        None if None in targets else targets,
    )
    replies, prompts = (tuple(line[name] for line in (first, second)) for name in _TEXTS)
    return Answered(question, replies, prompts)
