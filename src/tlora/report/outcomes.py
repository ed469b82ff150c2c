"""Results of an evaluation: scores, differences to the first model, and changed items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tlora.report import corpus_metrics, paired
from tlora.report.intervals import Difference, Interval, holm
from tlora.report.read_evaluation import Evaluation, Sample, TaskSamples

if TYPE_CHECKING:
    import numpy as np

_NEAR = 1e-4  # rounding tolerance between a score and its items' scores

LOST, GAINED, OTHER = "lost", "gained", "other"
KINDS = (LOST, GAINED, OTHER)
"""Kinds of change to the first model: worse score; better score; same, not fully right score with
a different answer."""


@dataclass(frozen=True)
class Cell:
    """One model on one metric of a task."""

    model: str
    score: Interval | None
    """None if the evaluation has no such score."""
    difference: Difference | None = None
    """Difference to the first model; None for that one, and without items to resample."""
    changes: dict[str, list[int]] = field(default_factory=dict)
    """Indices of changed items by the `KINDS`; empty for the first model, and if items have no
    scores."""


@dataclass(frozen=True)
class Row:
    """One metric of a task, every model."""

    task: TaskSamples
    metric: str
    cells: list[Cell]
    items: int
    """Number of items with this score; some metrics cover only part of the items."""
    by_item: bool = False
    """Whether the score is the mean of the items' scores."""
    together: bool = False
    """Whether it is computed over all predictions together, like F1 and correlations."""
    right_or_wrong: bool = False
    """Whether every item scored 0 or 1."""

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.metric in self.task.lower

    @property
    def title(self) -> str:
        """The metric's name, and its direction if lower is better."""
        return f"{self.metric}, lower is better" if self.lower else self.metric

    @property
    def main(self) -> bool:
        """Whether this is the task's main metric."""
        return self.metric == self.task.metrics[0]


@dataclass(frozen=True)
class EvaluationResults:
    """A whole evaluation, compared."""

    evaluation: Evaluation
    rows: list[Row]
    tested: int
    """Number of tested differences of main metrics."""
    holding: set[tuple[str, str]]
    """Tasks and models whose difference remains significant among all tests (Holm)."""
    other_prompts: dict[tuple[str, str], int]
    """Number of items by task and model whose prompt differs from the first model's."""

    @property
    def first(self) -> str:
        """The model to which the others are compared."""
        return self.evaluation.models[0].name

    @property
    def others(self) -> list[str]:
        """All models but the first."""
        return [model.name for model in self.evaluation.models[1:]]

    @property
    def listed(self) -> list[Row]:
        """The rows with a list of changed items: each task's first row with item scores."""
        first = {row.task.name: row for row in reversed(self.rows) if row.by_item}
        return [row for row in first.values() if any(cell.changes for cell in row.cells)][::-1]


def gather(evaluation: Evaluation) -> EvaluationResults:
    """Compare the models of ``evaluation``, each with the first."""
    rows = [_row(evaluation, task, metric) for task in evaluation.tasks for metric in task.metrics]
    tested = {
        (row.task.name, cell.model): cell.difference.p
        for row in rows
        for cell in row.cells
        if row.main and cell.difference is not None and cell.difference.p is not None
    }
    holding = {key for key, holds in zip(tested, holm([*tested.values()]), strict=True) if holds}
    return EvaluationResults(evaluation, rows, len(tested), holding, _other_prompts(evaluation))


def _row(evaluation: Evaluation, task: TaskSamples, metric: str) -> Row:
    told = {model.name: _told(task, model.name, metric) for model in evaluation.models}
    given = {model: value for model, value in told.items() if value is not None}
    known = {
        model: found
        for model, samples in task.samples.items()
        if (found := {i: s.scores[metric] for i, s in enumerate(samples) if metric in s.scores})
    }
    means = {model: sum(found.values()) / len(found) for model, found in known.items()}
    if means and _near(given, means):
        return _by_item(task, metric, [*told], known)
    columns = {model: _columns(task.samples[model]) for model in given}
    if statistic := corpus_metrics.STATISTICS.get(metric):
        made = {m: float(statistic(*pair)) for m, pair in columns.items() if len(pair[0])}
        if _near(given, made):
            return _together(task, metric, [*told], columns)
    scores = {m: Interval(value, None, None, task.items) for m, value in given.items()}
    return Row(task, metric, [Cell(model, scores.get(model)) for model in told], task.items)


def _by_item(
    task: TaskSamples,
    metric: str,
    models: Sequence[str],
    known: Mapping[str, Mapping[int, float]],
) -> Row:
    lower = metric in task.lower
    exact = not lower and all(v in (0, 1) for found in known.values() for v in found.values())
    first, cells = models[0], []
    for model in models:
        if model not in known:
            cells.append(Cell(model, None))
            continue
        samples, difference, changes = task.samples[model], None, {}
        if model != first and first in known:
            both = [i for i in known[model] if i in known[first]]
            pair = (_scores(samples, known[name], both) for name in (model, first))
            difference = paired.difference(*pair)
            changes = _changes(task.samples[first], samples, metric, both, exact)
            if lower and difference is not None:
                difference = replace(difference, better=-difference.better)
                changes |= {GAINED: changes[LOST], LOST: changes[GAINED]}
        own = _scores(samples, known[model], list(known[model]))
        cells.append(Cell(model, paired.score(own), difference, changes))
    return Row(task, metric, cells, max(map(len, known.values())), True, right_or_wrong=exact)


def _together(
    task: TaskSamples,
    metric: str,
    models: Sequence[str],
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Row:
    """Return the row of a score without item scores, such as F1 or a correlation."""
    first, cells = models[0], []
    for model in models:
        if model not in columns:
            cells.append(Cell(model, None))
            continue
        predicted, labels = columns[model]
        difference = None
        if model != first and first in columns:
            difference = corpus_metrics.difference(metric, predicted, columns[first][0], labels)
        cells.append(Cell(model, corpus_metrics.score(metric, predicted, labels), difference))
    return Row(task, metric, cells, task.items, together=True)


def _columns(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and labels, or empty arrays if any is missing."""
    import numpy as np

    pairs = [(s.predicted, s.label) for s in samples if None not in (s.predicted, s.label)]
    whole = pairs if len(pairs) == len(samples) else []
    predicted, labels = np.array(whole, dtype=np.float64).reshape(-1, 2).T
    return predicted, labels


def _near(told: Mapping[str, float], made: Mapping[str, float]) -> bool:
    """Whether all scores in eval.json match its samples, up to rounding."""
    return all(
        model in made and abs(value - made[model]) <= _NEAR * max(1.0, abs(made[model]))
        for model, value in told.items()
    )


def _told(task: TaskSamples, model: str, metric: str) -> float | None:
    value = task.scores.get(model, {}).get(metric)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _scores(
    samples: Sequence[Sample], values: Mapping[int, float], places: Sequence[int]
) -> paired.Scores:
    groups = [samples[i].group or samples[i].item for i in places]
    grouped = len(set(groups)) < len(places)
    return paired.Scores([values[i] for i in places], groups if grouped else None)


def _changes(
    before: Sequence[Sample],
    after: Sequence[Sample],
    metric: str,
    places: Sequence[int],
    exact: bool,
) -> dict[str, list[int]]:
    changes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for place in places:
        old, new = before[place], after[place]
        change = new.scores[metric] - old.scores[metric]
        if change:
            changes[GAINED if change > 0 else LOST].append(place)
        elif not (exact and new.scores[metric] == 1) and _said(old, exact) != _said(new, exact):
            changes[OTHER].append(place)
    return changes


def _said(sample: Sample, exact: bool) -> tuple[str | None, str]:
    """Return the compared part of a reply: its answer, or all of it if graded."""
    if exact and sample.answer is not None:
        return sample.answer, ""
    return None, sample.reply.strip()


def _other_prompts(evaluation: Evaluation) -> dict[tuple[str, str], int]:
    first = evaluation.models[0].name
    counts = {
        (task.name, model): sum(
            old.prompt != new.prompt
            for old, new in zip(task.samples.get(first, samples), samples, strict=True)
        )
        for task in evaluation.tasks
        for model, samples in task.samples.items()
    }
    return {key: count for key, count in counts.items() if count}
