"""Read an evaluation's folder: the replies of its models to the items."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError
from tlora.evaluate.evalfolder import EvalFolder, unnegated


@dataclass(frozen=True)
class ModelEntry:
    """An evaluated model."""

    name: str
    kind: str
    """ "base", "adapter" or "merged"."""


@dataclass(frozen=True)
class Sample:
    """One item and one model's result on it."""

    item: str
    prompt: str
    reply: str
    answer: str | None
    """Answer parsed from the reply; None if there is none."""
    target: str | None
    scores: dict[str, float]
    """Scores by metric, without those that do not apply or are missing."""
    group: str | None = None
    """Items of one group depend on each other, as the turns of a conversation do."""
    predicted: float | None = None
    """Prediction of a model with a head: a class id or a value."""
    label: float | None = None
    """The true class id or value."""


@dataclass(frozen=True)
class TaskSamples:
    """One task and all samples of it."""

    name: str
    metrics: list[str]
    """Metrics, main one first. Empty if no model is finished."""
    protocol: str
    shots: int | None
    scores: dict[str, dict[str, float]]
    """Scores by model and metric, from eval.json; a missing model is unfinished."""
    truncated: dict[str, int]
    """Number of truncated prompts by model."""
    samples: dict[str, list[Sample]]
    """Samples by finished model, with items in the same order."""
    lower: frozenset[str] = frozenset()
    """The metrics where lower is better."""

    @property
    def items(self) -> int:
        """The number of items; 0 if no model is finished."""
        return len(next(iter(self.samples.values()), []))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on disk; differences are relative to the first model."""

    models: list[ModelEntry]
    tasks: list[TaskSamples]
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    """Provenance of each start; a resumed evaluation has several."""


def read(folder: str | Path) -> Evaluation:
    """Read an evaluation.

    Raises:
        ArtifactError: files are missing, damaged or in another format, or models have different
            items.
    """
    files = EvalFolder(folder)
    found = files.read()
    try:
        models = [ModelEntry(each["name"], each["kind"]) for each in found["models"]]
        tasks = [_task(files, task, models) for task in found["tasks"]]
        starts = found.get("starts") or [found["provenance"]]
        return Evaluation(models, tasks, found["config"], starts)
    except (KeyError, TypeError, AttributeError) as fault:
        raise ArtifactError(
            f"{files.path}: eval.json or a file of samples is damaged ({fault!r}); evaluate into"
            " another folder."
        ) from fault


def _task(files: EvalFolder, task: dict[str, Any], models: list[ModelEntry]) -> TaskSamples:
    name, scores, digests = task["name"], task["scores"], task.get("samples", {})
    done = [model.name for model in models if model.name in scores]
    samples = {
        model: {
            line["item"]: _sample(line)
            for line in files.read_samples(model, name, digests.get(model))
        }
        for model in done
    }
    for model in done[1:]:
        first, other = samples[done[0]], samples[model]
        unlike = [i for i in {**first, **other} if _target(first, i) != _target(other, i)]
        if unlike:
            raise ArtifactError(
                f"{files.path}: {name}: {done[0]} and {model} have different items or targets"
                f" ({len(unlike)}, as {unlike[0]!r}), so their scores cannot be compared; evaluate"
                " into another folder."
            )
    return TaskSamples(
        name=name,
        metrics=[metric.removeprefix("-") for metric in task["metrics"]],
        protocol=task["protocol"],
        shots=task["shots"],
        scores={model: unnegated(found) for model, found in scores.items()},
        truncated=task.get("truncated", {}),
        samples={model: [found[i] for i in samples[done[0]]] for model, found in samples.items()},
        lower=frozenset(m.removeprefix("-") for m in task["metrics"] if m.startswith("-")),
    )


def _target(samples: dict[str, Sample], item: str) -> tuple[str | None] | None:
    return (samples[item].target,) if item in samples else None


def _sample(line: dict[str, Any]) -> Sample:
    known = {each.name: line[each.name] for each in fields(Sample) if each.name in line}
    return Sample(**known | {"scores": unnegated(line["scores"])})
