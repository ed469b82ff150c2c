"""Parse numbers in common notations exactly.

A value is a `fractions.Fraction`, so 0.1 + 0.2 equals 3/10 but not 0.3000001. Currency, percent and
anything else after a number are units, and units are dropped: "50%" is 50, because the references
have none.
"""

from __future__ import annotations

import re
from fractions import Fraction

# Digits in groups of three, or plain; a decimal part; an exponent of at most three digits, because
# the value of 1e999999999 does not fit in memory.
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
_SIGN = r"[-+\u2212\u2013]"
_LATEX_FRACTION = rf"\\[dtc]?frac\s*\{{\s*(?P<top>{_SIGN}?\d+)\s*\}}\s*\{{\s*(?P<bottom>\d+)\s*\}}"
_NUMBER = re.compile(
    # A sign followed by a space is an operator, except at the start.
    rf"(?<![\d.])(?:(?P<sign>^{_SIGN}(?=\s)|{_SIGN}(?=\S))\s*)?"
    rf"(?:\\?[$€£]\s*)?(?P<late_sign>{_SIGN})?"
    rf"(?:{_LATEX_FRACTION}"
    rf"|(?P<whole>\d+)\s+(?P<part>\d+)\s*/\s*(?P<of>\d+)"
    rf"|(?P<value>{_DECIMAL})(?:\s*/\s*(?P<over>{_DECIMAL}))?)"
    r"(?![,:]?\d|[eE][-+]?\d)"
)
_LONGEST = 4000
"""Maximum characters of a number; Python rejects integers beyond 4,300 digits."""


def first_number(text: str) -> str | None:
    """Return the first number in ``text``, unchanged; None if there is none.

    Supports signs, currency, thousands commas, decimals, exponents, a/b, mixed numbers (1 1/2) and
    LaTeX's ``\\frac{a}{b}``. A malformed number ("12,50", "1:30") gives None, not a part of it or a
    later number.
    """
    match = _NUMBER.search(text)
    digit = re.search(r"\d", text)
    if match is None or digit is None or digit.start() < match.start():
        return None
    return match[0]


def last_number(text: str) -> str | None:
    """Return the last well-formed number in ``text``, unchanged; None if there is none."""
    found = [match[0] for match in _NUMBER.finditer(text)]
    return found[-1] if found else None


def value(text: str) -> Fraction | None:
    """Return the exact value of the `first_number` of ``text``; None also for division by 0."""
    number = first_number(text)
    match = _NUMBER.match(number) if number and len(number) <= _LONGEST else None
    if match is None:
        return None
    try:
        size = _size(match)
    except ZeroDivisionError:
        return None
    negative = sum(1 for name in ("sign", "late_sign") if (match[name] or "+") != "+")
    return -size if negative % 2 else size


def _size(match: re.Match[str]) -> Fraction:
    if match["top"] is not None:
        top = re.sub(r"[\u2212\u2013]", "-", match["top"])
        return Fraction(int(top), int(match["bottom"]))
    if match["whole"] is not None:
        return int(match["whole"]) + Fraction(int(match["part"]), int(match["of"]))
    size = Fraction(match["value"].replace(",", ""))
    return size / Fraction(match["over"].replace(",", "")) if match["over"] else size


def same_number(one: str, other: str) -> bool:
    """Whether both texts begin with a number and the numbers are exactly equal."""
    first = value(one)
    return first is not None and first == value(other)
