"""An evaluation as one HTML file: the table, a chart, and the changed replies."""

from __future__ import annotations

import functools
import os
from typing import Any

from tlora.report import evalwording as wording
from tlora.report import html, paired, svg
from tlora.report.outcomes import GAINED, LOST, OTHER, EvaluationResults, Row
from tlora.report.read_evaluation import TaskSamples

_PREFIX = 60  # minimum length of a common prefix to fold

# Names of the kinds of change, for right-or-wrong and for graded scores.
_EXACT = {
    LOST: "right before, wrong after",
    GAINED: "wrong before, right after",
    OTHER: "both wrong, different answers",
}
_GRADED = {LOST: "worse", GAINED: "better", OTHER: "same score, different reply"}


def render(results: EvaluationResults) -> str:
    """Return the page."""
    return html.render("evaluation.html.j2", context(results))


def context(results: EvaluationResults) -> dict[str, Any]:
    """Return the template's context of plain values and charts."""
    import yaml

    evaluation, listed = results.evaluation, results.listed
    samples = [each for task in evaluation.tasks for made in task.samples.values() for each in made]
    return {
        "title": _title(results),
        "summary": wording.summary(results),
        "results": results,
        "models": evaluation.models,
        "listed": listed,
        "marks": functools.partial(wording.marks, results),
        "panels": [(wording.name(row), panel(row)) for row in results.rows if row.main],
        "legend": wording.legend(results),
        "remarks": wording.remarks(results),
        "tasks": [wording.task(task) for task in evaluation.tasks],
        "resamples": paired.RESAMPLES,
        "grouped": any(sample.group is not None for sample in samples),
        "environment": html.machines(evaluation.starts),
        "configuration": yaml.safe_dump(evaluation.config, sort_keys=False, allow_unicode=True),
        "data": html.embedded(replies(results)),
    }


def panel(row: Row) -> str:
    """Return the chart of one metric: a line per model with its score and interval."""
    scored = [(cell.model, cell.score) for cell in row.cells if cell.score is not None]
    if not scored:
        return ""
    said = ", ".join(f"{model} {score.mean:.4f}" for model, score in scored)
    return svg.intervals(scored, 336, f"{wording.name(row)}: {said}")


def replies(results: EvaluationResults) -> dict[str, Any]:
    """Return the data for the page's list of changed items.

    Includes items changed by any model: texts once per item and model, and for each model the
    indices of the items that it changed.
    """
    return {
        "models": [model.name for model in results.evaluation.models],
        "tasks": [_replies(results, row) for row in results.listed],
    }


def _title(results: EvaluationResults) -> str:
    evaluation = results.evaluation
    models, tasks = (
        ", ".join(each.name for each in many) for many in (evaluation.models, evaluation.tasks)
    )
    return f"{models} on {tasks}"


def _replies(results: EvaluationResults, row: Row) -> dict[str, Any]:
    task = row.task
    models = [model.name for model in results.evaluation.models]
    changed = sorted({i for cell in row.cells for kind in cell.changes.values() for i in kind})
    place = {item: number for number, item in enumerate(changed)}
    prefix = common_prefix(task)
    items = []
    for i in changed:
        first = task.samples[models[0]][i]
        said: list[Any] = [None] * len(models)
        for at, model in enumerate(models):
            if model in task.samples:
                sample = task.samples[model][i]
                own = None if sample.prompt == first.prompt else sample.prompt[len(prefix) :]
                scores = [sample.scores.get(metric) for metric in task.metrics]
                said[at] = [sample.reply, sample.answer, scores, own]
        item = {"id": first.item, "prompt": first.prompt[len(prefix) :], "target": first.target}
        items.append(item | {"replies": said})
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
    """Return the full lines at the start of all prompts of a task, such as examples, or "" if they
    are short."""
    prompts = {sample.prompt for samples in task.samples.values() for sample in samples}
    common = os.path.commonprefix([*prompts])  # noqa: RUF071 - of texts, character by character
    common = common[: common.rfind("\n") + 1]
    return common if len(common) >= _PREFIX and len(prompts) > 1 else ""
