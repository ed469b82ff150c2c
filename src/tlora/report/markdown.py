"""Markdown that escapes names, labels and causes: no HTML, no links, no extra lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
"""Text that Markdown treats as HTML or a link, unlike "p < 0.05"."""

_BREAKS = re.compile(r"[^\S\u00a0\u202f]+")
"""White space except the non-breaking spaces in numbers."""


def document(lines: Iterable[str]) -> str:
    """Return the text of a file; each of ``lines`` stays one line without HTML and links.

    The text is also safe for a terminal: it has no control characters.
    """
    return "".join(f"{_inert(line)}\n" for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table.

    Args:
        head: the column titles.
        rows: the cells; "|", backticks and line ends in a cell are escaped.
    """
    first, *rest = (f"| {' | '.join(map(_cell, row))} |" for row in (head, *rows))
    return [first, f"|{'---|' * len(head)}", *rest]


def _cell(text: str) -> str:
    return re.sub(r"[|`]", r"\\\g<0>", _BREAKS.sub(" ", text).strip())


def _inert(line: str) -> str:
    return _TAG.sub("&lt;", _CONTROL.sub(" ", line)).replace("](", "]\\(")
