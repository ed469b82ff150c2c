"""Similarity of a reply and its reference in words and characters, as in `evaluate`.

Uses Google's rouge_score and sacrebleu, which lm-evaluation-harness installs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")
"""F-measures of single words, pairs of words, and the longest common subsequence (Lin 2004)."""


def rouge(reply: str, reference: str) -> dict[str, float]:
    """Return the ROUGE scores of a reply, from 0 to 1; words are not stemmed.

    Source: rouge_score's default settings, as in `evaluate.load("rouge")`.
    """
    found = _scorer().score(reference, reply)
    return {name: float(found[name].fmeasure) for name in ROUGE}


def chrf(replies: Sequence[str], references: Sequence[str]) -> float:
    """Return the chrF of all replies together, from 0 to 100 (Popović 2015).

    Source: sacrebleu's default settings, as in `evaluate.load("chrf")`.
    """
    import sacrebleu

    return float(sacrebleu.corpus_chrf([*replies], [[*references]]).score)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE)
