"""What an evaluation's page says in sentences."""

from __future__ import annotations

from tlora.report import paired
from tlora.report.numbers import count, signed
from tlora.report.outcomes import Cell, Results, Row
from tlora.report.read_evaluation import TaskSamples
from tlora.report.statistics import Difference


def name(row: Row) -> str:
    """Return what a row is called: the task, and the metric where the task has several."""
    return row.task.name if len(row.task.metrics) == 1 else f"{row.task.name} ({row.metric})"


def ends(found: Difference) -> str:
    """Return the ends of the interval of a difference, with their signs."""
    low, high = found.interval.low, found.interval.high
    assert low is not None
    assert high is not None
    return f"{signed(low)} to {signed(high)}"


def marks(results: Results, row: Row, cell: Cell) -> str:
    """Return the signs beside a difference: † holds alone, but not with all others; * prompts
    differ."""
    key = (row.task.name, cell.model)
    found = cell.difference
    alone = found and found.better and row.main and results.tested > 1
    return "†" * bool(alone and key not in results.holding) + "*" * (key in results.other_prompts)


def legend(results: Results) -> str:
    """Explain the `marks` that the table has, and say what looking at many comparisons does."""
    used = {
        mark for row in results.rows for cell in row.cells for mark in marks(results, row, cell)
    }
    said = []
    if "†" in used:
        said.append("† taken alone; not when all are tested together (Holm).")
    if "*" in used:
        said.append("* the prompts differ.")
    if results.tested > 1:
        said.append(
            f"With {results.tested} comparisons at 95 %, about {results.tested / 20:.1f} would"
            " differ by chance if all models were equal."
        )
    return " ".join(said)


def summary(results: Results) -> str:
    """Say what the table shows, and what it does not."""
    if not results.others:
        return (
            f"One model, {results.first}: nothing to compare it with. Its replies are in samples/."
        )
    return " ".join(_summary(results, model) for model in results.others)


def _summary(results: Results, model: str) -> str:
    named: dict[int, list[str]] = {1: [], -1: [], 0: []}
    rows = [row for row in results.rows if row.main]
    for row in rows:
        found = next(cell for cell in row.cells if cell.model == model).difference
        if found is not None:
            named[found.better].append(row.task.name)
    parts = [
        f"{word} on {_tasks(named[way], len(rows))}"
        for way, word in ((1, "better"), (-1, "worse"), (0, "not told apart from it"))
        if named[way]
    ]
    if not parts:
        return f"{model} is not compared with {results.first}."
    return f"{model} against {results.first}: {'; '.join(parts)}."


def _tasks(named: list[str], of: int) -> str:
    if len(named) == of and of > 1:
        return f"all {of} tasks"
    return ", ".join(named) if len(named) <= 6 else f"{len(named)} of {of} tasks"


def task(found: TaskSamples) -> str:
    """Return what a task is, in a line."""
    shots = "" if not found.shots else f", {found.shots} examples before each"
    protocol = f": {found.protocol.rstrip('.')}" if found.protocol else ""
    return f"{found.name}{protocol}; {count(found.items)} items{shots}."


def method(results: Results) -> list[str]:
    """Return how the figures were made, a sentence or two each."""
    said = [
        "Scores are means over items, each metric on its own scale; higher is better for all."
        " Their intervals are Wilson's where items are right or wrong, and percentile bootstrap"
        " elsewhere.",
        f"Differences are paired: both models' scores of an item are drawn together,"
        f" {count(paired.RESAMPLES)} times with a fixed seed, and the interval holds the middle"
        " 95 % of the differences (percentile bootstrap).",
        "p is of the paired test in which each item's difference is as likely up as down; for right"
        " and wrong that is McNemar's exact test. A model is called better or worse only if the"
        " interval leaves zero out and p is below 0.05; anything else is a tie.",
        "Intervals say how other items of the kind would turn out with these same models. They say"
        " nothing of another training run, nor of items that the models have seen in training.",
    ]
    if any(row.together for row in results.rows):
        said.append(
            "F1, Matthews' and other correlations are of all items together: an item's label is"
            " drawn with both models' predictions, and p is of the test in which these are as"
            " likely the other way round (approximate randomisation)."
        )
    lists = [made for found in results.evaluation.tasks for made in found.samples.values()]
    if any(sample.group is not None for made in lists for sample in made):
        said.append("Items of one group, as turns of a conversation, are drawn together.")
    return said


def remarks(results: Results) -> list[str]:
    """Say what is not there and what is not like for like."""
    said = [
        f"{task}: {', '.join(models)} {'is' if len(models) == 1 else 'are'} not done."
        for task, models in results.missing
    ]
    said += [
        f"{task}: {model} was given other prompts than {results.first} on {count(unlike)} items."
        for (task, model), unlike in results.other_prompts.items()
    ]
    said += [
        f"{name(row)}: {model} has no score on {count(lacking)} of {count(row.task.items)} items,"
        " which are left out."
        for row in results.rows
        if row.main and row.by_item
        for model, samples in row.task.samples.items()
        if (lacking := sum(row.metric not in sample.scores for sample in samples))
    ]
    said += [
        f"{found.name}: {count(lost)} of {count(found.items)} prompts lost their beginning, being"
        f" too long for {model}."
        for found in results.evaluation.tasks
        for model, lost in found.truncated.items()
        if lost
    ]
    said += [
        f"{name(row)}: the score is not the mean of scores of items, so it has no interval and is"
        " not compared."
        for row in results.rows
        if not (row.by_item or row.together) and row.task.samples
    ]
    return said
