"""An evaluation as Markdown and as CSV."""

from __future__ import annotations

import csv
import io

from tlora.report import evalwording as wording
from tlora.report import numbers
from tlora.report.outcomes import KINDS, Cell, Results

_COLUMNS = (
    "task",
    "metric",
    "model",
    "items",
    "score",
    "score_low",
    "score_high",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "verdict",
    *KINDS,
)
_VERDICTS = {1: "better", -1: "worse", 0: "tie"}


def markdown(results: Results) -> str:
    """Return the table and what belongs to it."""
    models = [model.name for model in results.evaluation.models]
    lines = [
        _line(["task", "metric", "items", *models]),
        "|---|---|---|" + "---|" * len(models),
    ]
    lines += [
        _line([r.task.name, r.metric, numbers.count(r.items), *map(_cell, r.cells)])
        for r in results.rows
    ]
    said = " ".join(filter(None, (wording.summary(results), wording.caveat(results))))
    lines += ["", said, ""]
    if results.others:
        lines += [
            f"- {wording.verdict(results, row, cell)}"
            for row in results.rows
            for cell in row.cells
            if cell.difference is not None
        ]
    lines += [f"- {sentence}" for sentence in wording.remarks(results)]
    lines += [f"- {wording.task(task)}" for task in results.evaluation.tasks]
    lines += [f"- {sentence}" for sentence in wording.method(results)]
    return "\n".join(lines) + "\n"


def table(results: Results) -> str:
    """Return every score as a line of CSV; what there is not is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in results.rows:
        for cell in row.cells:
            score, found = cell.score, cell.difference
            difference: list[object] = [""] * 5
            if found is not None:
                known = found.interval
                difference = [known.mean, known.low, known.high, found.p, _VERDICTS[found.better]]
            writer.writerow(
                [
                    row.task.name,
                    row.metric,
                    cell.model,
                    row.items,
                    *([score.mean, score.low, score.high] if score else [""] * 3),
                    *difference,
                    *(len(cell.changes[kind]) if cell.changes else "" for kind in KINDS),
                ]
            )
    return text.getvalue()


def _cell(cell: Cell) -> str:
    if cell.score is None:
        return numbers.NONE
    text = numbers.number(cell.score.mean)
    if cell.difference is None:
        return text
    return (
        f"{text} ({numbers.signed(cell.difference.interval.mean)},"
        f" {wording.ends(cell.difference)}: {_VERDICTS[cell.difference.better]})"
    )


def _line(cells: list[str]) -> str:
    # A "|" or a line's end in a name would end the cell.
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"
