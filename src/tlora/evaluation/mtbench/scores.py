"""Grades to the figures that are reported.

Source: FastChat's summary of single-answer grades, published with arXiv 2306.05685: means over
answers, those without a grade left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tlora.evaluation.mtbench.judging import TURNS, Answered, Judged

MAIN = "score"


def metric_names(answered: Sequence[Answered]) -> list[str]:
    """Return the names of the scores: all answers, each turn, each category in the file's order."""
    categories = dict.fromkeys(each.question.category for each in answered)
    return [MAIN, *(f"turn_{turn}" for turn in TURNS), *categories]


def means(answered: Sequence[Answered], judged: Judged) -> dict[str, float]:
    """Return the mean grade under each name of `metric_names`, 1 to 10.

    A name whose answers have all been left unrated is left out.
    """
    grades: dict[str, list[float]] = {name: [] for name in metric_names(answered)}
    for each, pair in zip(answered, judged.judgements, strict=True):
        for turn, judgement in zip(TURNS, pair, strict=True):
            if judgement.score is not None:
                for name in (MAIN, f"turn_{turn}", each.question.category):
                    grades[name].append(judgement.score)
    return {name: math.fsum(some) / len(some) for name, some in grades.items() if some}
