"""Markdown in which names, labels and causes stay text: no HTML, no link, no line of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
"""Where Markdown sees HTML or a link; "p < 0.05" is neither."""

_BREAKS = re.compile(r"[^\S\u00a0\u202f]+")
"""White space but the spaces in numbers, which do not break."""


def document(lines: Iterable[str]) -> str:
    """Return the text of a file; each of ``lines`` stays one line without HTML and links.

    A terminal can show it too: it holds no control characters.
    """
    return "".join(f"{_inert(line)}\n" for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table.

    Args:
        head: the titles of the columns.
        rows: their cells; a "|", a backtick or the end of a line in one ends no cell.
    """
    first, *rest = (f"| {' | '.join(map(_cell, row))} |" for row in (head, *rows))
    return [first, f"|{'---|' * len(head)}", *rest]


def _cell(text: str) -> str:
    return re.sub(r"[|`]", r"\\\g<0>", _BREAKS.sub(" ", text).strip())


def _inert(line: str) -> str:
    return _TAG.sub("&lt;", _CONTROL.sub(" ", line)).replace("](", "]\\(")
