"""The report of an evaluation: page, Markdown and CSV, made from its files alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

from tlora.files import replacing_file
from tlora.report import evalpage, numbers, outcomes, read_evaluation
from tlora.report import evalwording as wording
from tlora.report.outcomes import KINDS, Cell, Results, Row

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


class Report(NamedTuple):
    """Where the report is, and its text."""

    page: Path
    markdown: Path
    table: Path
    text: str
    """What the Markdown file holds."""


def write(folder: str | Path) -> Report:
    """Write report.html, report.md and report.csv into ``folder``, each atomically.

    Neither a model nor the tasks' data are needed. Nothing is written where anything is wrong.

    Raises:
        ArtifactError: as `tlora.report.read_evaluation.read`.
    """
    results = outcomes.gather(read_evaluation.read(folder))
    text = markdown(results)
    contents = (evalpage.render(results), text, table(results))
    page, summary, scores = (Path(folder) / f"report.{kind}" for kind in ("html", "md", "csv"))
    for path, content in zip((page, summary, scores), contents, strict=True):
        with replacing_file(path) as part:
            part.write_text(content, encoding="utf-8")
    return Report(page, summary, scores, text)


def markdown(results: Results) -> str:
    """Return the table and what belongs to it."""
    models = [model.name for model in results.evaluation.models]
    lines = [
        _line(["task", "metric", "items", *models]),
        "|---|---|---|" + "---|" * len(models),
    ]
    lines += [
        _line(
            [
                row.task.name,
                row.metric,
                numbers.count(row.items),
                *(_cell(results, row, cell) for cell in row.cells),
            ]
        )
        for row in results.rows
    ]
    said = " ".join(filter(None, (wording.summary(results), wording.legend(results))))
    lines += ["", said, ""]
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


def _cell(results: Results, row: Row, cell: Cell) -> str:
    if cell.score is None:
        return numbers.NONE
    text = numbers.number(cell.score.mean)
    if cell.difference is None:
        return text
    verdict = _VERDICTS[cell.difference.better] + wording.marks(results, row, cell)
    mean = numbers.signed(cell.difference.interval.mean)
    return f"{text} ({mean}, {wording.ends(cell.difference)}: {verdict})"


def _line(cells: list[str]) -> str:
    # A "|" or a line's end in a name would end the cell.
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"
