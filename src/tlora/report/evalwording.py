"""Sentences on an evaluation's page."""

from __future__ import annotations

from tlora.report.numbers import count
from tlora.report.outcomes import Cell, EvaluationResults, Row
from tlora.report.read_evaluation import TaskSamples


def name(row: Row) -> str:
    """Return the name of a row: the task, and the metric if the task has several."""
    return row.task.name if len(row.task.metrics) == 1 else f"{row.task.name} ({row.title})"


def marks(results: EvaluationResults, row: Row, cell: Cell) -> str:
    """Return the marks next to a difference: † significant alone, but not among all others; *
    prompts differ."""
    key = (row.task.name, cell.model)
    found = cell.difference
    alone = found and found.better and row.main and results.tested > 1
    return "†" * bool(alone and key not in results.holding) + "*" * (key in results.other_prompts)


def legend(results: EvaluationResults) -> str:
    """Explain the `marks` in the table, and the effect of multiple comparisons."""
    used = {
        mark for row in results.rows for cell in row.cells for mark in marks(results, row, cell)
    }
    said = []
    if "†" in used:
        said.append("† significant alone, but not when all are tested together (Holm).")
    if "*" in used:
        said.append("* the prompts differ.")
    if results.tested > 1:
        said.append(
            f"With {results.tested} comparisons at 95 %, about {results.tested / 20:.1f} would"
            " differ by chance if all models were equal."
        )
    return " ".join(said)


def summary(results: EvaluationResults) -> str:
    """Summarize what the table shows and what it does not."""
    if not results.others:
        return f"{results.first} is the only model. Its replies are in samples/."
    return " ".join(_summary(results, model) for model in results.others)


def _summary(results: EvaluationResults, model: str) -> str:
    named: dict[int, list[str]] = {1: [], -1: [], 0: []}
    rows = [row for row in results.rows if row.main]
    for row in rows:
        found = next(cell for cell in row.cells if cell.model == model).difference
        if found is not None:
            named[found.better].append(row.task.name)
    parts = [
        f"{word} on {', '.join(named[way])}"
        for way, word in ((1, "better"), (-1, "worse"), (0, "tied"))
        if named[way]
    ]
    if not parts:
        return f"{model} is not compared with {results.first}."
    return f"{model} compared with {results.first}: {'; '.join(parts)}."


def task(found: TaskSamples) -> str:
    """Return one line about a task."""
    shots = "" if not found.shots else f", {found.shots} examples in each prompt"
    protocol = f": {found.protocol.rstrip('.')}" if found.protocol else ""
    return f"{found.name}{protocol}; {count(found.items)} items{shots}."


def remarks(results: EvaluationResults) -> list[str]:
    """List unequal conditions between models."""
    said = [
        f"{task}: {model} had different prompts than {results.first} on {count(unlike)} items."
        for (task, model), unlike in results.other_prompts.items()
    ]
    said += [
        f"{name(row)}: {model} has no score on {count(lacking)} of {count(row.task.items)} items,"
        " which are excluded."
        for row in results.rows
        if row.main and row.by_item
        for model, samples in row.task.samples.items()
        if (lacking := sum(row.metric not in sample.scores for sample in samples))
    ]
    said += [
        f"{found.name}: {count(lost)} of {count(found.items)} prompts were truncated because they"
        f" exceed the context length of {model}."
        for found in results.evaluation.tasks
        for model, lost in found.truncated.items()
        if lost
    ]
    said += [
        f"{name(row)}: the score is not a mean of item scores, so it has no interval and no"
        " comparison."
        for row in results.rows
        if not (row.by_item or row.together) and row.task.samples
    ]
    return said
