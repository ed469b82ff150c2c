"""Extract the answer to a MATH problem as a string, and compare answers as strings.

Sources: the grader of MATH (Hendrycks et al., arXiv 2103.03874) with the additions of Minerva
(Lewkowycz et al., arXiv 2206.14858, appendix D). Departures: a unit is anything in ``\\text`` that
ends the answer, not one of a list of words; an escaped brace does not count as a brace.
"""

from __future__ import annotations

import re

_SPACES = re.compile(r"(?P<row>\\\\)|\\[!,;: ]|\\q?quad\b|~|\s+")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])")
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degrees?\b|°")
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|bold|rm)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[^\s({\[,])\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed`` (or ``\\fbox``) in ``text``, or None.

    Braces nest, and an escaped brace is a character. ``\\boxed 7`` without braces extends to the
    end of the formula or line. An unclosed or empty box gives None.
    """
    found = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if not found:
        return None
    start = found[-1].end()
    if not text.startswith("{", start):
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return text[start + 1 : start + token.start()].strip() or None
    return None


def same_string(one: str, other: str) -> bool:
    """Whether two answers are equal after normalization."""
    return normalized(one) == normalized(other)


def normalized(answer: str) -> str:
    """Return ``answer`` without meaningless parts and with shorthand expanded.

    Drops spaces, bracket sizes, degrees, currency, percent, thousands commas, a unit at the end, a
    short left side ("x ="), and a full stop. Expands ``\\frac12``, ``\\sqrt3``, 1/2, .5 and 0.5 to
    ``\\frac{1}{2}``, ``\\sqrt{3}``, ``\\frac{1}{2}``, and .5 and 0.5 to the same. Not idempotent on
    nonsense; two answers are compared after one pass each.
    """
    text = answer.strip().rstrip(".").strip()
    text = re.sub(r"^\$(.*)\$$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = _DEGREES.sub("", _SIZES.sub("", text))
    text = re.sub(r"\\?[$%]", "", text)
    text = text.replace("{,}", ",").replace(r",\!", ",")
    text = _WORDS.sub(r"\1", _UNIT.sub("", text.strip()))
    text = _SPACES.sub(lambda space: space["row"] or "", text)
    text = _without_left_side(text)
    text = re.sub(r"(^|[{(\[,+\-])\.(\d)", r"\g<1>0.\2", text)
    text = _written_out(text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return r"\frac{1}{2}" if text == "0.5" else text


def _without_left_side(text: str) -> str:
    """Drop "x=" or "x_1=": one equals sign with at most two characters before it."""
    left, sign, right = text.partition("=")
    return right if sign and len(left) <= 2 and "=" not in right else text


def _written_out(text: str) -> str:
    text = re.sub(r"\\sqrt([^{\[\\])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([^{\\])", r"\1{\2}", text)
    return re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
