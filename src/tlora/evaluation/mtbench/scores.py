"""Grades to the figures that are reported.

Source: FastChat's summary of single-answer grades, published with arXiv 2306.05685: means over
answers, those without a grade left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tlora.evaluation.mtbench.judging import TURNS, Answered, Judged
from tlora.evaluation.mtbench.questions import Question

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
