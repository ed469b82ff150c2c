"""What an evaluation says: scores, differences to the first model, and which items changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlora.report import corpus_metrics, paired
from tlora.report.read_evaluation import Evaluation, Sample, TaskSamples
from tlora.report.statistics import Difference, Interval, holm

if TYPE_CHECKING:
    import numpy as np

_NEAR = 1e-4  # how far a score may be from what its items make, for rounding

LOST, GAINED, OTHER = "lost", "gained", "other"
KINDS = (LOST, GAINED, OTHER)
"""Scored lower than by the first model; higher; the same, not fully right, and answered
differently."""


@dataclass(frozen=True)
class Cell:
    """One model on one metric of a task."""

    model: str
    score: Interval | None
    """None if the evaluation has no such score."""
    difference: Difference | None
    """To the first model; None for that one, and where there is nothing to draw again."""
    changes: dict[str, list[int]]
    """Places of the items that changed, by the `KINDS`; empty for the first model, and where items
    have no scores of their own."""


@dataclass(frozen=True)
class Row:
    """One metric of a task, every model."""

    task: TaskSamples
    metric: str
    cells: list[Cell]
    items: int
    """How many items have this score; some metrics are of a part of the items."""
    by_item: bool
    """Whether the score is the mean of the items' scores."""
    together: bool
    """Whether it is made of all predictions together, as F1 and correlations are."""
    right_or_wrong: bool
    """Whether every item scored 0 or 1."""

    @property
    def main(self) -> bool:
        """Whether this is the task's main metric."""
        return self.metric == self.task.metrics[0]


@dataclass(frozen=True)
class Results:
    """A whole evaluation, compared."""

    evaluation: Evaluation
    rows: list[Row]
    tested: int
    """How many differences of main metrics were tested."""
    holding: set[tuple[str, str]]
    """Tasks and models whose difference holds when all those are tested together (Holm)."""
    other_prompts: dict[tuple[str, str], int]
    """By task and model: how many items were put to it in other words than to the first model."""

    @property
    def first(self) -> str:
        """The model that the others are compared to."""
        return self.evaluation.models[0].name

    @property
    def others(self) -> list[str]:
        """All models but the first."""
        return [model.name for model in self.evaluation.models[1:]]

    def listed(self, task: TaskSamples) -> Row | None:
        """Return the row by which the items of ``task`` are listed; None if none has scores."""
        return next((row for row in self.rows if row.task is task and row.by_item), None)

    @property
    def missing(self) -> list[tuple[str, list[str]]]:
        """Tasks, and the models that are not done with them."""
        models = [model.name for model in self.evaluation.models]
        left = [(t.name, [m for m in models if m not in t.scores]) for t in self.evaluation.tasks]
        return [(task, models) for task, models in left if models]


def gather(evaluation: Evaluation) -> Results:
    """Compare the models of ``evaluation``, each with the first."""
    rows = [_row(evaluation, task, metric) for task in evaluation.tasks for metric in task.metrics]
    tested = {
        (row.task.name, cell.model): cell.difference.p
        for row in rows
        for cell in row.cells
        if row.main and cell.difference is not None and cell.difference.p is not None
    }
    holding = {key for key, holds in zip(tested, holm([*tested.values()]), strict=True) if holds}
    return Results(evaluation, rows, len(tested), holding, _other_prompts(evaluation))


def _row(evaluation: Evaluation, task: TaskSamples, metric: str) -> Row:
    known = {
        model: found
        for model, samples in task.samples.items()
        if (found := {i: s.scores[metric] for i, s in enumerate(samples) if metric in s.scores})
    }
    told = {model.name: _told(task, model.name, metric) for model in evaluation.models}
    by_item = bool(known) and all(
        _agrees(value, known.get(model)) for model, value in told.items() if value is not None
    )
    if not by_item:
        return _undivided(task, metric, told)
    exact = all(value in (0, 1) for found in known.values() for value in found.values())
    first = evaluation.models[0].name
    cells = []
    for model, value in told.items():
        if model not in known:
            cells.append(_bare(task, model, value))
            continue
        samples, difference, changes = task.samples[model], None, {}
        if model != first and first in known:
            both = [i for i in known[model] if i in known[first]]
            pair = (_scores(samples, known[name], both) for name in (model, first))
            difference = paired.difference(*pair)
            changes = _changes(task.samples[first], samples, metric, both, exact)
        own = _scores(samples, known[model], list(known[model]))
        cells.append(Cell(model, paired.score(own), difference, changes))
    items = max(map(len, known.values()))
    return Row(task, metric, cells, items, by_item=True, together=False, right_or_wrong=exact)


def _undivided(task: TaskSamples, metric: str, told: Mapping[str, float | None]) -> Row:
    """Return the row of a score that items have no part of, as F1 or a correlation."""
    columns = {model: _columns(task.samples[model]) for model in told if model in task.samples}
    together = metric in corpus_metrics.STATISTICS and all(
        _remade(metric, value, columns.get(model))
        for model, value in told.items()
        if value is not None
    )
    cells, first = [], next(iter(told))
    for model, value in told.items():
        if value is None or not together:
            cells.append(_bare(task, model, value))
            continue
        predicted, labels = columns[model]
        difference = None
        if model != first and told[first] is not None:
            difference = corpus_metrics.difference(metric, predicted, columns[first][0], labels)
        cells.append(Cell(model, corpus_metrics.score(metric, predicted, labels), difference, {}))
    return Row(
        task, metric, cells, task.items, by_item=False, together=together, right_or_wrong=False
    )


def _bare(task: TaskSamples, model: str, value: float | None) -> Cell:
    score = None if value is None else Interval(value, None, None, task.items)
    return Cell(model, score, None, {})


def _columns(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and labels, of no items where one has none."""
    import numpy as np

    pairs = [(s.predicted, s.label) for s in samples if None not in (s.predicted, s.label)]
    whole = pairs if len(pairs) == len(samples) else []
    predicted, labels = np.array(whole, dtype=np.float64).reshape(-1, 2).T
    return predicted, labels


def _remade(metric: str, told: float, columns: tuple[np.ndarray, np.ndarray] | None) -> bool:
    """Whether the score that eval.json tells is that of the predictions, but for rounding."""
    if columns is None or not len(columns[0]):
        return False
    return abs(told - float(corpus_metrics.STATISTICS[metric](*columns))) <= _NEAR


def _told(task: TaskSamples, model: str, metric: str) -> float | None:
    """Return the score that eval.json has; None for none and for what is no number."""
    value = task.scores.get(model, {}).get(metric)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _scores(
    samples: Sequence[Sample], values: Mapping[int, float], places: Sequence[int]
) -> paired.Scores:
    groups = [samples[i].group or samples[i].item for i in places]
    grouped = len(set(groups)) < len(places)
    return paired.Scores([values[i] for i in places], groups if grouped else None)


def _agrees(told: float, found: Mapping[int, float] | None) -> bool:
    """Whether the score that eval.json tells is the mean of the items', but for rounding."""
    if not found:
        return False
    mean = sum(found.values()) / len(found)
    return abs(told - mean) <= _NEAR * max(1.0, abs(mean))


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
    """Return what of a reply is compared: the answer read from it; of a graded one, all of it."""
    if exact and sample.answer is not None:
        return sample.answer, ""
    return None, sample.reply.strip()


def _other_prompts(evaluation: Evaluation) -> dict[tuple[str, str], int]:
    first = evaluation.models[0].name
    found = {}
    for task in evaluation.tasks:
        for model, samples in task.samples.items():
            pairs = zip(task.samples.get(first, samples), samples, strict=True)
            unlike = sum(old.prompt != new.prompt for old, new in pairs)
            if unlike:
                found[task.name, model] = unlike
    return found
