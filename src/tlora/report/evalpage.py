"""An evaluation as one HTML file: the table, a picture of it, and the replies that changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tlora.report import environment, html, svg
from tlora.report import evalwording as wording
from tlora.report.outcomes import GAINED, LOST, OTHER, Cell, Results, Row
from tlora.report.read_evaluation import TaskSamples

_PREFIX = 60  # so many characters in common are worth folding away

# What the kinds of change are called, of right and wrong, and of graded scores.
_EXACT = {
    LOST: "right before, wrong after",
    GAINED: "wrong before, right after",
    OTHER: "both wrong, answered differently",
}
_GRADED = {LOST: "lower", GAINED: "higher", OTHER: "same score, another reply"}


def render(results: Results) -> str:
    """Return the page."""
    return html.render("evaluation.html.j2", context(results))


def context(results: Results) -> dict[str, Any]:
    """Return all that the template shows, as plain values and drawn charts."""
    import yaml

    evaluation = results.evaluation
    listed = _listed(results)
    rows = [(r, [_cell(results, r, cell, listed) for cell in r.cells]) for r in results.rows]
    return {
        "title": _title(results),
        "summary": wording.summary(results),
        "results": results,
        "models": evaluation.models,
        "rows": rows,
        "panels": [(wording.name(row), panel(row)) for row in results.rows if row.main],
        "legend": wording.legend(results),
        "remarks": wording.remarks(results),
        "tasks": [wording.task(task) for task in evaluation.tasks],
        "method": wording.method(results),
        "environment": environment.rows(evaluation.starts),
        "configuration": yaml.safe_dump(evaluation.config, sort_keys=False, allow_unicode=True),
        "listed": listed,
        "data": html.embedded(replies(results, listed)),
    }


def panel(row: Row) -> str:
    """Return the picture of one metric: a line a model, its score and interval."""
    scored = [(cell.model, cell.score) for cell in row.cells if cell.score is not None]
    if not scored:
        return ""
    said = ", ".join(f"{model} {score.mean:.4f}" for model, score in scored)
    return svg.intervals(scored, 336, f"{wording.name(row)}: {said}")


def replies(results: Results, listed: Mapping[str, int]) -> dict[str, Any]:
    """Return what the page's list of changed items is made of.

    An item is there if any model changed it: texts once an item and model, and for each model the
    places of the items that it changed.
    """
    return {
        "models": [model.name for model in results.evaluation.models],
        "tasks": [
            _replies(results, row)
            for row in results.rows
            if row.task.name in listed and results.listed(row.task) is row
        ],
    }


def _title(results: Results) -> str:
    evaluation = results.evaluation
    models, tasks = ([each.name for each in many] for many in (evaluation.models, evaluation.tasks))
    named = [
        ", ".join(names) if len(names) <= 3 else f"{len(names)} {what}"
        for names, what in ((models, "models"), (tasks, "tasks"))
    ]
    return f"{named[0]} on {named[1]}"


def _listed(results: Results) -> dict[str, int]:
    """Return the place in the list of each task that has something to list."""
    rows = [row for row in results.rows if results.listed(row.task) is row]
    names = [row.task.name for row in rows if any(cell.changes for cell in row.cells)]
    return {name: place for place, name in enumerate(names)}


def _replies(results: Results, row: Row) -> dict[str, Any]:
    task = row.task
    models = [model.name for model in results.evaluation.models]
    changed = sorted({i for cell in row.cells for kind in cell.changes.values() for i in kind})
    place = {item: number for number, item in enumerate(changed)}
    prefix = common_prefix(task)
    items = []
    for i in changed:
        first = task.samples[models[0]][i]
        item: dict[str, Any] = {
            "id": first.item,
            "prompt": first.prompt[len(prefix) :],
            "target": first.target,
            "replies": [],
        }
        for model in models:
            if model not in task.samples:
                item["replies"].append(None)
                continue
            sample = task.samples[model][i]
            own = None if sample.prompt == first.prompt else sample.prompt[len(prefix) :]
            scores = [sample.scores.get(metric) for metric in task.metrics]
            item["replies"].append([sample.reply, sample.answer, scores, own])
        items.append(item)
    return {
        "name": task.name,
        "metrics": task.metrics,
        "names": _EXACT if row.right_or_wrong else _GRADED,
        "exact": row.right_or_wrong,
        "main": task.metrics.index(row.metric),
        "prefix": prefix,
        "items": items,
        "changes": [
            {kind: [place[i] for i in found] for kind, found in cell.changes.items()} or None
            for cell in row.cells
        ],
    }


def common_prefix(task: TaskSamples) -> str:
    """Return the whole lines that all prompts of a task begin with, such as examples, or "" if
    they are few."""
    prompts = {sample.prompt for samples in task.samples.values() for sample in samples}
    common = os.path.commonprefix([*prompts])  # noqa: RUF071 - of texts, character by character
    common = common[: common.rfind("\n") + 1]
    return common if len(common) >= _PREFIX and len(prompts) > 1 else ""


def _cell(results: Results, row: Row, cell: Cell, listed: Mapping[str, int]) -> dict[str, Any]:
    found = cell.difference
    models = [model.name for model in results.evaluation.models]
    browsed = row.task.name in listed and results.listed(row.task) is row
    return {
        "model": cell.model,
        "score": cell.score,
        "difference": found and found.interval,
        "kind": found and {1: "win", -1: "loss", 0: "tie"}[found.better],
        "marks": wording.marks(results, row, cell),
        "task": listed.get(row.task.name),
        "place": models.index(cell.model),
        "changes": cell.changes if browsed else {},
    }
