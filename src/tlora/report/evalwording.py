"""What an evaluation's page says in sentences."""

from __future__ import annotations

from tlora.report import paired
from tlora.report.numbers import count, number, signed
from tlora.report.outcomes import Cell, Results, Row
from tlora.report.samples import Task
from tlora.report.statistics import Difference


def name(row: Row) -> str:
    """Return what a row is called: the task, and the metric where the task has several."""
    return row.task.name if len(row.task.metrics) == 1 else f"{row.task.name} ({row.metric})"


def p_value(p: float | None) -> str:
    """Return "p = 0.012" with two digits; below 0.0001 only that it is."""
    if p is None:
        return ""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def ends(found: Difference) -> str:
    """Return the interval of a difference, both ends signed."""
    low, high = found.interval.low, found.interval.high
    assert low is not None
    assert high is not None
    return f"{signed(low)} to {signed(high)}"


def verdict(results: Results, row: Row, cell: Cell) -> str:
    """Say in a sentence whether a model differs from the first one beyond the noise."""
    found = cell.difference
    if found is None:
        return f"{name(row)}: {cell.model} and {results.first} are not compared, {_why(row)}."
    said = f"{name(row)}: {_said(results, row, cell, found)}"
    unlike = results.other_prompts.get((row.task.name, cell.model))
    if unlike:
        said += (
            f" On {count(unlike)} of {count(row.task.items)} items the two were given different"
            " prompts, so this is the difference of model and prompt together."
        )
    return said


def _why(row: Row) -> str:
    if row.items == 1:
        return "one item says nothing about others"
    if not (row.by_item or row.together) and row.task.samples:
        return "the score is not the mean of scores of items"
    return "one of them has no score"


def _said(results: Results, row: Row, cell: Cell, found: Difference) -> str:
    known = found.interval
    facts = (
        f"95 % interval of the difference {ends(found)}, {count(known.count)} items,"
        f" {p_value(found.p)}"
    )
    if found.better:
        word = "better" if found.better == 1 else "worse"
        return (
            f"{cell.model} is {word} than {results.first} by {number(abs(known.mean))}"
            f" ({facts}).{_together(results, row, cell)}"
        )
    said = f"tie, {cell.model} minus {results.first} is {signed(known.mean)} ({facts})."
    if row.by_item and not cell.changes["gained"] and not cell.changes["lost"]:
        return f"{said} No item is scored differently."
    assert known.low is not None
    assert known.high is not None
    if known.low <= 0 <= known.high:
        return f"{said} The interval holds zero: these items do not tell the two apart."
    return (
        f"{said} The interval leaves zero out, but the test finds that so few changed items could"
        " fall this way by chance."
    )


def _together(results: Results, row: Row, cell: Cell) -> str:
    if not row.main or results.tested < 2:
        return ""
    holds = (row.task.name, cell.model) in results.holding
    return (
        f" That {'holds too' if holds else 'is this one taken alone and does not hold'} when all"
        f" {results.tested} comparisons are tested together (Holm)."
    )


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


def caveat(results: Results) -> str:
    """Say what looking at many comparisons does."""
    if results.tested < 2:
        return ""
    return (
        f"With {results.tested} comparisons at 95 %, about {results.tested / 20:.1f} would differ"
        " by chance if all models were equal."
    )


def task(found: Task) -> str:
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
