"""The table of the first try: each method at its default learning rate, beside the tuned ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from tlora.report import markdown as tables
from tlora.report.comparison import MethodResult, Results
from tlora.report.intervals import difference, interval
from tlora.report.numbers import NONE, margin, number, signed

NOTE = (
    "Default: the geometric median of the method's best learning rates in the comparisons that are"
    " named, which are on other tasks; nothing of this one has a part in it. The score is on the"
    " test rows with the final seeds; differences are paired by seed, with 95 % intervals."
)


@dataclass(frozen=True)
class Table:
    """What the table says, as text."""

    head: list[str]
    rows: list[list[str]]
    absent: str
    """Names the methods that no other comparison has; empty if there are none."""
    note: str = NOTE


def table(results: Results) -> Table:
    """Return the methods that have a default, the best first."""
    best = next((m for m in results.methods if m.scores), None)
    head = ["method", "default learning rate", "from", results.comparison.metric, "95 %", "seeds"]
    head += ["minus tuned", f"minus {best.label}, tuned" if best else "minus best tuned"]
    known = [m for m in results.methods if results.comparison.default(m.entry) is not None]
    sign = -1.0 if results.comparison.better == "higher" else 1.0
    # As in the table of scores: means over other seeds are in no common order.
    known.sort(
        key=lambda m: (-len(m.first_try), sign * fmean(m.first_try.values()) if m.first_try else 0)
    )
    absent = [m.label for m in results.methods if m not in known]
    said = f"No other comparison has: {', '.join(absent)}." if absent else ""
    return Table(head, [_row(results, m, best) for m in known], said)


def markdown(results: Results) -> list[str]:
    """Return the lines of the table."""
    made = table(results)
    lines = ["", "**First try**", "", *tables.table(made.head, made.rows), "", made.note]
    return [*lines, *[made.absent] * bool(made.absent), ""]


def _row(results: Results, method: MethodResult, best: MethodResult | None) -> list[str]:
    made, scores = results.comparison, method.first_try
    rate = made.default(method.entry)
    origins = made.first_try[method.label]
    start = [method.label, f"{rate:g}", "; ".join(f"{name} {each:g}" for name, each in origins)]
    if not scores:
        return [*start, NONE, "", "no score", "", ""]
    score = interval([*scores.values()])
    return [
        *start,
        number(score.mean),
        margin(score),
        " ".join(map(number, scores.values())),
        _minus(scores, method.scores, made.better),
        _minus(scores, best.scores, made.better) if best else NONE,
    ]


def _minus(first: Mapping[int, float], second: Mapping[int, float], better: str) -> str:
    if first == second:
        return "same runs"
    found = difference(first, second, better)
    return NONE if found is None else f"{signed(found.interval.mean)} {margin(found.interval)}"
