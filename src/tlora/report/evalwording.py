"""Sentences on an evaluation's page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
    useless = [row for row in results.rows if row.main and _is_useless(row)]
    said = [*_useless(results, useless), *(_of(results, m) for m in results.others)]
    return " ".join(filter(None, said))


def _is_useless(row: Row) -> bool:
    """Whether the metric is 0 for every model."""
    return len(row.cells) > 1 and all(cell.score and cell.score.mean == 0 for cell in row.cells)


def _useless(results: EvaluationResults, rows: list[Row]) -> Iterator[str]:
    for metric, tasks in _grouped((row.metric, row.task.name) for row in rows).items():
        models = f"{'both' if len(results.others) == 1 else 'all'} models{_on(results, tasks)}"
        yield f"{metric} is 0 for {models}, so it cannot tell them apart."


_WAYS = ((1, "is better than"), (-1, "is worse than"), (0, "ties with"))


def _of(results: EvaluationResults, model: str) -> str:
    """Compare a model with the first, by the main metrics and then by the others that differ."""
    differs = [
        (row, cell.difference.better)
        for row in results.rows
        for cell in row.cells
        if cell.model == model and cell.difference is not None
    ]
    main = [(row, way) for row, way in differs if row.main]
    if not main:
        return f"{model} is not compared with {results.first}."
    said = []
    for metric, rows in _grouped((r.metric, (r, w)) for r, w in main if not _is_useless(r)).items():
        found = _grouped((way, row.task.name) for row, way in rows)
        parts = [
            f"{words} {results.first} on {_and(found[way])}" for way, words in _WAYS if way in found
        ]
        said.append(f"By {metric}, {model} {' and '.join(parts)}.")
    others = _grouped(((r.task.name, w), r.metric) for r, w in differs if w and not r.main)
    alike = _grouped(((*metrics,), (task, way)) for (task, way), metrics in others.items())
    for metrics, places in alike.items():
        for way, tasks in _grouped((way, task) for task, way in places).items():
            who, word = "it" if said else model, "better" if way > 0 else "worse"
            said.append(f"By {_and(metrics)} {who} is {word}{_on(results, tasks)}.")
    return " ".join(said)


def _on(results: EvaluationResults, tasks: Sequence[str]) -> str:
    return f" on {_and(tasks)}" if len(results.evaluation.tasks) > 1 else ""


def _and(names: Sequence[str]) -> str:
    """Return "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """Return the second values by the first."""
    found: dict[Any, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


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
    whole = [r for r in results.rows if not (r.by_item or r.together) and r.task.samples]
    for found, metrics in _grouped((row.task.name, row.metric) for row in whole).items():
        place = f"{found}: " if len(results.evaluation.tasks) > 1 else ""
        words = "have no interval: they are" if metrics[1:] else "has no interval: it is"
        said.append(f"{place}{_and(metrics)} {words} computed over all rows at once.")
    return said
