"""Convert row labels to class names; "0", 0 and 0.0 are equal, as table readers make floats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tlora.errors import DataError, shortened
from tlora.tasks.base import text_of

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_WHOLE = re.compile(r"[+-]?\d+\.0*")


def canonical(text: str) -> str:
    """Return the canonical form of a label: "1" for "1.0"."""
    return text.partition(".")[0] if _WHOLE.fullmatch(text) else text


def name_of(raw: Mapping[str, Any], column: str, where: str) -> str:
    """Return the class of a row.

    Raises:
        DataError: the column is missing or empty, or lists several classes.
    """
    value = raw.get(column)
    if isinstance(value, (list, dict)):
        raise DataError(
            f"{where}: column {column!r} is {shortened(value)}, but a row must have one class; give"
            " one label per row."
        )
    return canonical(text_of(raw, column, where))


def classes(rows: Iterable[tuple[str, Mapping[str, Any]]], column: str) -> list[str]:
    """Return the classes of training rows: sorted numbers, then names in alphabetical order.

    Args:
        rows: places and rows.
        column: the label column.

    Raises:
        DataError: as `name_of`.
    """
    names = {name_of(row, column, where) for where, row in rows}
    return sorted(names, key=_order)


def _order(name: str) -> tuple[bool, float, str]:
    """Return a sort key by which "10" follows "9"."""
    number = _NUMBER.fullmatch(name)
    return (not number, float(name) if number else 0, name)
