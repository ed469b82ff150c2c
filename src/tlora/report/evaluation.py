"""The report of an evaluation: page and Markdown, built from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tlora.files import replacing_file
from tlora.report import evalpage, numbers, outcomes, read_evaluation
from tlora.report import evalwording as wording
from tlora.report import markdown as tables
from tlora.report.outcomes import Cell, EvaluationResults, Row

_VERDICTS = {1: "better", -1: "worse", 0: "tie"}


class Report(NamedTuple):
    """Paths and text of the report."""

    page: Path
    markdown: Path
    text: str
    """Contents of the Markdown file."""


def write(folder: str | Path) -> Report:
    """Write report.html and report.md into ``folder``, each atomically.

    Needs neither a model nor the tasks' data. Writes nothing in case of an error.

    Raises:
        ArtifactError: as `tlora.report.read_evaluation.read`.
    """
    results = outcomes.gather(read_evaluation.read(folder))
    page, summary = (Path(folder) / f"report.{kind}" for kind in ("html", "md"))
    text = markdown(results)
    for path, content in ((page, evalpage.render(results)), (summary, text)):
        with replacing_file(path) as part:
            part.write_text(content, encoding="utf-8")
    return Report(page, summary, text)


def markdown(results: EvaluationResults) -> str:
    """Return the table and its notes."""
    models = [model.name for model in results.evaluation.models]
    made = []
    for row in results.rows:
        cells = [_cell(results, row, cell) for cell in row.cells]
        made.append([row.task.name, row.title, numbers.count(row.items), *cells])
    lines = tables.table(["task", "metric", "items", *models], made)
    lines += ["", " ".join(filter(None, (wording.summary(results), wording.legend(results)))), ""]
    lines += [f"- {sentence}" for sentence in wording.remarks(results)]
    lines += [f"- {wording.task(task)}" for task in results.evaluation.tasks]
    return tables.document(lines)


def _cell(results: EvaluationResults, row: Row, cell: Cell) -> str:
    if cell.score is None:
        return numbers.NONE if cell.model in row.task.samples else "not done"
    text = numbers.number(cell.score.mean)
    if cell.difference is None:
        return text
    verdict = _VERDICTS[cell.difference.better] + wording.marks(results, row, cell)
    known = cell.difference.interval
    mean, low, high = (numbers.signed(v or 0.0) for v in (known.mean, known.low, known.high))
    return f"{text} ({mean}, {low} to {high}: {verdict})"
