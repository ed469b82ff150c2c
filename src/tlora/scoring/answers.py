"""Protocols for extracting the answer from a model's text and checking it.

A published score depends on its protocol; two protocols for one data set can differ by points. So
each has a name and a source, and none is relaxed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from tlora.scoring.latex import boxed, same_string
from tlora.scoring.quantities import first_number, last_number, same_number, value
from tlora.scoring.symbolic import MathVerify

MARK = "The answer is: "
"""Text before the answer in the paper's training data."""


@dataclass(frozen=True)
class Protocol:
    """One way to score a text."""

    name: str
    """Its name in results."""
    source: str
    """The publication or code that defines the rule, with every departure."""
    extract: Callable[[str], str | None]
    """Extracts the answer from a text, or None."""
    correct: Callable[[str, str], bool]
    """Whether an answer equals the reference, which is a bare answer, not a solution."""

    def score(self, text: str, reference: str) -> bool:
        """Whether ``text`` contains the right answer."""
        answer = self.extract(text)
        return answer is not None and self.correct(answer, reference)


def after_mark(text: str) -> str | None:
    """Return the text after the last "The answer is: ", up to a full stop that ends a line."""
    _, mark, rest = text.rpartition(MARK)
    answer = rest.split(".\n", maxsplit=1)[0].strip().removesuffix(".").strip()
    return answer if mark and answer else None


def _number_after_mark(text: str) -> str | None:
    return first_number(after_mark(text) or "")


def _metamath_number(text: str) -> str | None:
    """Return the number as MetaMath's script reads it: rounded, and truncated at a second comma."""
    match = re.search(r"[-+]?\d*[.,/]?\d+", after_mark(text) or "")
    if match is None:
        return None
    top, slash, bottom = match[0].replace(",", "").partition("/")
    try:
        return str(round(int(top) / int(bottom) if slash and bottom != "0" else float(top)))
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def _number_after_hashes(text: str) -> str | None:
    match = re.search(r"#### *(-?[\d.,]*\d)", text.replace("$", ""))
    return match[1] if match else None


def _last_plain_number(text: str) -> str | None:
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return found[-1] if found else None


def _within_a_thousandth(answer: str, reference: str) -> bool:
    one, other = value(answer), value(reference)
    return one is not None and other is not None and abs(one - other) <= Fraction(1, 1000)


def math_answer(text: str) -> str | None:
    """Return the text after the last "The answer is: ", or else in the last ``\\boxed``."""
    marked = after_mark(text)
    if marked is None:
        return boxed(text)
    return boxed(marked) or marked


def math_verdicts(text: str, reference: str, verifier: MathVerify) -> dict[str, bool]:
    """Score an answer to a MATH problem by both rules.

    Returns:
        "string": the rule behind the figures of the paper's lineage. "symbolic": math-verify's
        verdict, or the string rule if math-verify cannot parse an answer or times out. Only the
        symbolic rule accepts equivalent answers such as 0.25 and 1/4.
    """
    answer = math_answer(text)
    if answer is None:
        return {"string": False, "symbolic": False}
    string = same_string(answer, reference)
    symbolic = verifier.equal(answer, reference)
    return {"string": string, "symbolic": string if symbolic is None else symbolic}


def _first_of(*choices: str) -> Callable[[str], str | None]:
    """Return a function that finds the first of ``choices`` anywhere in a text."""
    pattern = re.compile("|".join(choices))

    def extract(text: str) -> str | None:
        match = pattern.search(text)
        return match[0] if match else None

    return extract


def _same(answer: str, reference: str) -> bool:
    return answer == reference


_ADAPTERS = "LLM-Adapters (Hu et al., arXiv 2304.01933)"
_COMMONSENSE = f"{_ADAPTERS}, commonsense_evaluate.py: the first choice named, case as written"

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "answer-is",
            'TLoRA (arXiv 2604.18124): the number after the last "The answer is: "; equality is'
            " exact, where the lineage's script rounds",
            _number_after_mark,
            same_number,
        ),
        Protocol(
            "metamath-gsm8k",
            "MetaMath (Yu et al., arXiv 2309.12284), eval_gsm8k.py: as answer-is, but rounded to"
            " an integer, and 1,234,567 read as 1234",
            _metamath_number,
            same_number,
        ),
        Protocol(
            "gsm8k",
            'GSM8K (Cobbe et al., arXiv 2110.14168): the first "#### n"; departure: 5.0 is 5',
            _number_after_hashes,
            same_number,
        ),
        Protocol(
            "gsm8k-last-number",
            "lm-evaluation-harness, gsm8k, flexible-extract: the last number; departure: read and"
            " compared exactly",
            last_number,
            same_number,
        ),
        Protocol(
            "llm-adapters-number",
            f"{_ADAPTERS}, evaluate.py: the last number, right within 0.001",
            _last_plain_number,
            _within_a_thousandth,
        ),
        Protocol(
            "llm-adapters-letter",
            f"{_ADAPTERS}, evaluate.py: the first capital A to E, in whatever word",
            _first_of("A", "B", "C", "D", "E"),
            _same,
        ),
        Protocol(
            "math",
            "MetaMath (arXiv 2309.12284), eval_math.py, with the grader of MATH (arXiv 2103.03874)"
            " and Minerva's normalization (arXiv 2206.14858); see `tlora.scoring.latex`",
            math_answer,
            same_string,
        ),
        Protocol("true-false", _COMMONSENSE, _first_of("true", "false"), _same),
        Protocol("solution", _COMMONSENSE, _first_of("solution1", "solution2"), _same),
        Protocol("answer", _COMMONSENSE, _first_of(*(f"answer{n}" for n in range(1, 6))), _same),
        Protocol("ending", _COMMONSENSE, _first_of(*(f"ending{n}" for n in range(1, 5))), _same),
        Protocol("option", _COMMONSENSE, _first_of("option1", "option2"), _same),
    )
}
"""All protocols by name."""
