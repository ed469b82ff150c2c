"""Word problems as LLM-Adapters (Hu et al., arXiv 2304.01933) evaluates them.

Of a reply counts the last number, right within 0.001, or for AQuA the first capital A to E. As
there, 256 tokens are generated; departures: the paper's prompt in place of that script's, whose
lines are indented, and greedy, where it searches four beams while sampling at temperature 0.1.
"""

from __future__ import annotations

from typing import ClassVar

from tlora.errors import DataError
from tlora.evaluation.answers import PROTOCOLS
from tlora.evaluation.harness.base import AnswerTask, Doc, Group
from tlora.evaluation.harness.rows import Raw, Source, adapters_source
from tlora.runconfig import DataConfig
from tlora.tasks.base import text_of
from tlora.tasks.math import Math


class WordProblems(AnswerTask):
    """Columns instruction and answer, a number."""

    source: ClassVar[Source]
    rule = PROTOCOLS["llm-adapters-number"]
    max_gen_toks = 256

    def doc(self, raw: Raw, where: str) -> Doc:
        """Return the training task's prompt, and the answer.

        Column `output` is not looked at: a model wrote it, and it is often wrong.
        """
        target = text_of(raw, "answer", where)
        if not self.rule.score(target, target):
            raise DataError(
                f"{where}: column 'answer' is {target!r}, which {self.rule.name} cannot read; is it"
                " another data set's file?"
            )
        return {"prompt": Math(DataConfig()).row(raw, where)["prompt"], "target": target}


class AddSub(WordProblems):
    """Addition and subtraction (Hosseini et al., EMNLP 2014)."""

    source = adapters_source("math_word", "AddSub")


class MultiArith(WordProblems):
    """Several operations (Roy and Roth, arXiv 1608.01413)."""

    source = adapters_source("math_word", "MultiArith")


class SingleEq(WordProblems):
    """One equation (Koncel-Kedziorski et al., TACL 2015)."""

    source = adapters_source("math_word", "SingleEq")


class Svamp(WordProblems):
    """Variations that mislead (Patel et al., arXiv 2103.07191)."""

    source = adapters_source("math_word", "SVAMP")


class Mawps(WordProblems):
    """A mixture of the others (Koncel-Kedziorski et al., NAACL 2016); not in that script."""

    source = adapters_source("math_word", "mawps")


class Aqua(WordProblems):
    """Algebra with five choices (Ling et al., arXiv 1705.04146)."""

    source = adapters_source("math_word", "AQuA")
    rule = PROTOCOLS["llm-adapters-letter"]


ARITHMETIC = Group(
    (
        *("multiarith-llm-adapters", "gsm8k-llm-adapters", "addsub-llm-adapters"),
        *("aqua-llm-adapters", "singleeq-llm-adapters", "svamp-llm-adapters"),
    )
)
"""The six of that publication's table, in its order."""
