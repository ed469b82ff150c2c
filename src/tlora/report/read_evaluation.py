"""An evaluation's folder, read and checked: which models gave which replies to which items.

Everything that is wrong is named at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError
from tlora.evaluate.evalfolder import EvalFolder

_FILE = "eval.json"
_SHOWN = 3  # so many of one kind of fault are spelled out
_AGAIN = "evaluate into another folder"
_TEXTS = ("item", "prompt", "reply", "answer", "target", "group")
_NUMBERS = ("predicted", "label")


@dataclass(frozen=True)
class ModelEntry:
    """A model that was evaluated."""

    name: str
    kind: str
    """ "base", "adapter" or "merged"."""


@dataclass(frozen=True)
class Sample:
    """One item and what one model made of it."""

    item: str
    prompt: str
    reply: str
    answer: str | None
    """As read from the reply; None if there is none in it."""
    target: str | None
    scores: dict[str, float]
    """By metric; one that the item has no part in, or that could not be given, is left out."""
    group: str | None
    """Items of one group depend on each other, as the turns of a conversation do."""
    predicted: float | None = None
    """What a model with a head made of it: a class by its number, or a value."""
    label: float | None = None
    """The true one."""


@dataclass(frozen=True)
class TaskSamples:
    """One task and all samples of it."""

    name: str
    metrics: list[str]
    """The first is the main one; higher is better for all. Empty where no model is done."""
    protocol: str
    shots: int | None
    scores: dict[str, dict[str, float]]
    """By model and metric, as eval.json has them; a model that it does not name is not done."""
    truncated: dict[str, int]
    """By model, how many prompts were too long for it and lost their beginning."""
    samples: dict[str, list[Sample]]
    """By model that is done, items in the same order for all."""

    @property
    def items(self) -> int:
        """The number of items; 0 where no model is done."""
        return len(next(iter(self.samples.values()), []))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it is on disk; differences are to the first model."""

    models: list[ModelEntry]
    tasks: list[TaskSamples]
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    """Provenance of each start; an evaluation that was stopped has several."""


def read(folder: str | Path) -> Evaluation:
    """Read an evaluation.

    Raises:
        ArtifactError: files are missing, damaged or of another format, or models were asked
            different things; all faults are listed.
    """
    return _Reader(EvalFolder(folder)).evaluation()


@dataclass
class _Reader:
    folder: EvalFolder
    faults: list[str] = field(default_factory=list)

    def evaluation(self) -> Evaluation:
        found = self.folder.read()
        models = [
            ModelEntry(each["name"], str(each.get("kind", "")))
            for each in self._named(found, "models")
        ]
        tasks = [self._task(task, models) for task in self._named(found, "tasks")]
        if len(self.faults) == 1:
            raise ArtifactError(f"{self.folder.path}: {self.faults[0]}")
        if self.faults:
            lines = "".join(f"\n  - {fault}" for fault in self.faults)
            raise ArtifactError(f"{self.folder.path}: {len(self.faults)} faults:{lines}")
        starts = found.get("starts") or [found.get("provenance") or {}]
        return Evaluation(models, tasks, found.get("config") or {}, starts)

    def _named(self, found: dict[str, Any], what: str) -> list[dict[str, Any]]:
        """Return the list ``what``, of objects that have names."""
        listed = found.get(what)
        listed = listed if isinstance(listed, list) else []
        names = [each.get("name") for each in listed if isinstance(each, dict)]
        if not listed or len(names) < len(listed) or not _texts(names):
            raise ArtifactError(f"{self.folder.path}: {_FILE} lists no {what} by name; {_AGAIN}.")
        return listed

    def _task(self, task: dict[str, Any], models: list[ModelEntry]) -> TaskSamples:
        name, scores = task["name"], task.get("scores") or {}
        before = len(self.faults)
        if not _texts(task.get("metrics")):
            self.faults.append(f"{_FILE}: task {name!r} has no list of metrics; {_AGAIN}.")
        done = [model.name for model in models if model.name in scores]
        samples = {model: self._samples(model, name, task.get("items")) for model in done}
        if len(self.faults) == before:
            for model in done[1:]:
                self._check_alike(name, (done[0], samples[done[0]]), (model, samples[model]))
        if len(self.faults) == before and done:
            order = {sample.item: place for place, sample in enumerate(samples[done[0]])}
            for listed in samples.values():
                listed.sort(key=lambda sample: order[sample.item])
        return TaskSamples(
            name=name,
            metrics=task.get("metrics") or [],
            protocol=str(task.get("protocol") or ""),
            shots=task.get("shots"),
            scores=scores,
            truncated=task.get("truncated") or {},
            samples=samples,
        )

    def _samples(self, model: str, task: str, count: Any) -> list[Sample]:
        file = self.folder.samples_file(model, task)
        place = file.relative_to(self.folder.path)
        if not file.resolve().is_relative_to(self.folder.samples.resolve()):
            self.faults.append(f"{_FILE}: {place} is outside of samples/; {_AGAIN}.")
            return []
        if not file.is_file():
            self.faults.append(
                f"there is no {place}; the command of the evaluation makes it if given again."
            )
            return []
        samples: dict[str, Sample] = {}
        faults = []
        for number, line in _lines(file):
            try:
                sample = _sample(line)
                if sample.item in samples:
                    raise ValueError(f"item {sample.item!r} is there twice")
                samples[sample.item] = sample
            except ValueError as error:
                faults.append(f"{place}, line {number}: {error}.")
        if not faults and count is not None and count != len(samples):
            faults.append(f"{place} has {len(samples)} items, {_FILE} says {count}; {_AGAIN}.")
        elif not faults and not samples:
            faults.append(f"{place} is empty; {_AGAIN}.")
        self.faults += faults[:_SHOWN]
        if len(faults) > _SHOWN:
            self.faults.append(f"{place}: {len(faults) - _SHOWN} more lines are damaged.")
        return list(samples.values())

    def _check_alike(
        self, task: str, first: tuple[str, list[Sample]], second: tuple[str, list[Sample]]
    ) -> None:
        """Note if two models were given different items, or items with different targets."""
        (one, mine), (other, theirs) = first, second
        known = {sample.item: sample for sample in mine}
        given = {sample.item for sample in theirs}
        ends = f"their scores cannot be compared item by item; {_AGAIN}."
        for there, missing, without in (
            (one, [s.item for s in mine if s.item not in given], other),
            (other, [s.item for s in theirs if s.item not in known], one),
        ):
            if missing:
                self.faults.append(
                    f"{task}: {there} has {_some(missing)} which {without} has not; {ends}"
                )
        unlike = [s.item for s in theirs if s.item in known and known[s.item].target != s.target]
        if unlike:
            self.faults.append(
                f"{task}: {one} and {other} have different targets for {_some(unlike)}; {ends}"
            )


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _sample(line: str) -> Sample:
    """Return the sample of a line; ValueError says what is wrong with it."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    scores = found.get("scores")
    if not isinstance(scores, dict):
        raise ValueError("`scores` is no object of numbers by metric")
    for name in _TEXTS:
        value, needed = found.get(name), name in ("item", "prompt", "reply")
        if not isinstance(value, str) and (needed or value is not None):
            kind = "not text" if needed else "neither text nor null"
            raise ValueError(f"`{name}` is {value!r:.60}, {kind}")
    numbers = {f"`{name}`": found[name] for name in _NUMBERS if name in found}
    for name, value in (numbers | {f"the score {key!r}": scores[key] for key in scores}).items():
        if not _finite(value):
            raise ValueError(f"{name} is {value!r:.60}, not a finite number")
    texts: dict[str, Any] = {name: _clean(found.get(name)) for name in _TEXTS}
    marks = {metric: float(value) for metric, value in scores.items()}
    return Sample(**texts, scores=marks, predicted=found.get("predicted"), label=found.get("label"))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _clean(text: Any) -> Any:
    """Return ``text`` without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text and text.encode("utf-8", "replace").decode("utf-8")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _some(items: list[str]) -> str:
    """Return how many ``items`` there are and the first of them."""
    named = ", ".join(map(repr, items[:_SHOWN]))
    more = ", ..." if len(items) > _SHOWN else ""
    return f"{len(items)} item{'s' if len(items) > 1 else ''} ({named}{more})"
