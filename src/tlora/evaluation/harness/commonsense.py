"""The paper's eight sets of commonsense questions, in the form of LLM-Adapters.

A question with its choices is the instruction; the reply is to be "the correct answer is
answer2", of which the first choice that is named counts. LLM-Adapters' script (Hu et al., arXiv
2304.01933) generates 32 tokens, as here; departures from it: the paper's prompt in place of that
script's, whose lines are indented, and greedy, where it searches four beams while sampling at
temperature 0.1.
"""

from __future__ import annotations

from typing import ClassVar

from tlora.errors import DataError
from tlora.evaluation.answers import PROTOCOLS
from tlora.evaluation.harness.base import AnswerTask, Doc, Group
from tlora.evaluation.harness.rows import Raw, Source, adapters_source
from tlora.runconfig import DataConfig
from tlora.tasks.base import text_of
from tlora.tasks.commonsense import Commonsense


class Choice(AnswerTask):
    """One of the eight: columns instruction, output, answer."""

    source: ClassVar[Source]
    max_gen_toks = 32

    def doc(self, raw: Raw, where: str) -> Doc:
        """Return the training task's prompt, and the choice that its answer names."""
        row = Commonsense(DataConfig()).row(raw, where)
        target = text_of(raw, "answer", where)
        if self.rule.extract(row["response"]) != target:
            raise DataError(
                f"{where}: column 'output' is {row['response']!r}, in which the choice is not the"
                f" one of column 'answer', {target!r}; is it another data set's file?"
            )
        return {"prompt": row["prompt"], "target": target}


class BoolQ(Choice):
    """Yes or no (Clark et al., arXiv 1905.10044); LLM-Adapters leaves the passage out."""

    source = adapters_source("commonsense", "boolq")
    rule = PROTOCOLS["true-false"]


class Piqa(Choice):
    """How things are done (Bisk et al., arXiv 1911.11641)."""

    source = adapters_source("commonsense", "piqa")
    rule = PROTOCOLS["solution"]


class SocialIqa(Choice):
    """What people do and why (Sap et al., arXiv 1904.09728)."""

    source = adapters_source("commonsense", "social_i_qa")
    rule = PROTOCOLS["answer"]


class HellaSwag(Choice):
    """How a scene goes on (Zellers et al., arXiv 1905.07830)."""

    source = adapters_source("commonsense", "hellaswag")
    rule = PROTOCOLS["ending"]


class WinoGrande(Choice):
    """Who or what a blank stands for (Sakaguchi et al., arXiv 1907.10641)."""

    source = adapters_source("commonsense", "winogrande")
    rule = PROTOCOLS["option"]


class ArcEasy(Choice):
    """Questions of school science that retrieval solves (Clark et al., arXiv 1803.05457)."""

    source = adapters_source("commonsense", "ARC-Easy")
    rule = PROTOCOLS["answer"]


class ArcChallenge(Choice):
    """Questions of school science that retrieval does not solve (arXiv 1803.05457)."""

    source = adapters_source("commonsense", "ARC-Challenge")
    rule = PROTOCOLS["answer"]


class OpenBookQa(Choice):
    """Facts of science, applied (Mihaylov et al., arXiv 1809.02789)."""

    source = adapters_source("commonsense", "openbookqa")
    rule = PROTOCOLS["answer"]


COMMONSENSE = Group(
    (
        *("boolq-paper", "piqa-paper", "social_iqa-paper", "hellaswag-paper"),
        *("winogrande-paper", "arc_easy-paper", "arc_challenge-paper", "openbookqa-paper"),
    )
)
"""All eight, in the order of the paper's table."""
