"""The runs of a comparison: which there are, which are ready, which are done.

Tuning runs are every method x learning rate x tuning seed. Final runs, a method x final seed, wait
until their method's tuning runs are settled, because these choose the learning rate.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tlora.compareconfig import EXACT_MATCH, CompareConfig, MethodEntry
from tlora.comparefolder import CompareFolder
from tlora.digests import file_digest, model_identity
from tlora.errors import ArtifactError
from tlora.report.choice import best_rate
from tlora.runconfig import SharedConfig

Phase = Literal["tuning", "final"]
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One run: a method at a learning rate with a seed."""

    entry: MethodEntry
    learning_rate: float
    seed: int
    phase: Phase
    name: str
    """Name of its files: readable, and ended by a digest of all that defines the run."""

    def record(self) -> dict[str, Any]:
        """Return what is known before the run starts."""
        return {
            "name": self.name,
            "phase": self.phase,
            "method": self.entry.name,
            "adapter": self.entry.given(),
            "calibration": self.entry.calibration,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Comparison:
    """A comparison with what identifies its runs.

    Two machines with the same rows and model agree on every name, wherever the files lie.
    """

    config: CompareConfig
    metric: str
    better: str
    experiment: str
    """Digest of what all runs share: model, rows, steps, schedule, batch."""

    def tuning(self) -> list[Point]:
        """Return the tuning runs; seeds outermost, so that what has run so far is a fair part."""
        entries, seeds = self.config.entries(), self.config.tuning_seeds
        rounds = itertools.product(seeds, range(len(entries[0].learning_rates)))
        return [
            self._point(entry, entry.learning_rates[place], seed, "tuning")
            for number, (seed, place) in enumerate(rounds)
            for entry in turned(entries, number)
        ]

    def tuning_of(self, entry: MethodEntry) -> list[Point]:
        """Return the tuning runs of one method."""
        return [
            self._point(entry, rate, seed, "tuning")
            for rate in entry.learning_rates
            for seed in self.config.tuning_seeds
        ]

    def final(self, entry: MethodEntry, rate: float) -> list[Point]:
        """Return the final runs of a method at the chosen ``rate``."""
        return [self._point(entry, rate, seed, "final") for seed in self.config.final_seeds]

    def score(self, record: dict[str, Any] | None, rows: str) -> float | None:
        """Return the score that is compared, on ``rows``: "validation" or "test"."""
        if record is None or record["status"] != "finished":
            return None
        return record["scores"].get(rows, {}).get(self.metric)

    def chosen(self, entry: MethodEntry, folder: CompareFolder) -> float | None:
        """Return the learning rate that the tuning runs choose; None while one is not there."""
        scores: dict[float, list[float | None]] = {}
        for point in self.tuning_of(entry):
            record = folder.record(point.name)
            if record is None:
                return None
            scores.setdefault(point.learning_rate, []).append(self.score(record, "validation"))
        return best_rate(scores, len(self.config.tuning_seeds), self.better)

    def _point(self, entry: MethodEntry, rate: float, seed: int, phase: Phase) -> Point:
        defining = [self.experiment, entry.name, entry.given(), rate, seed, phase]
        if entry.calibration:
            defining.append(entry.calibration)
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", entry.name)
        name = f"{readable}-lr{rate:g}-seed{seed}-{phase}-{digest(defining)[:8]}"
        return Point(entry, rate, seed, phase, name)


class Schedule:
    """What to do next, on this machine.

    A finished run is done for good. A failed one is tried again, once each time that the
    comparison is started, by the machine whose part it is.
    """

    def __init__(self, comparison: Comparison, folder: CompareFolder) -> None:
        self.comparison = comparison
        self.folder = folder
        self._attempted: set[str] = set()
        self._finished: set[str] = set()
        self._tuning = comparison.tuning()
        self._own_tuning = {point.name for point in self._mine(self._tuning)}

    def __iter__(self) -> Iterator[Point]:
        """Yield the runs of this part that can start now, tuning runs first."""
        for point in [*self._mine(self._tuning), *self._finals()]:
            if point.name not in self._attempted and not self._is_finished(point):
                yield point

    def next(self) -> Point | None:
        """Return the next run to start, which will not be returned again, or None for now."""
        point = next(iter(self), None)
        if point is not None:
            self._attempted.add(point.name)
            # What failed before and runs again is not settled in the meantime.
            self.folder.record_file(point.name).unlink(missing_ok=True)
        return point

    def counts(self) -> tuple[int, int]:
        """Return how many runs of this part are finished, and how many there are.

        A method with no learning rate to be chosen has no final runs.
        """
        finals = self._final_slots()
        mine = [*self._mine(self._tuning), *(point for _, point in finals if point)]
        waiting = sum(point is None for entry, point in finals if not self._settled(entry))
        return sum(map(self._is_finished, mine)), len(mine) + waiting

    def without_adapters(self) -> int:
        """Return how many finished final runs of this part have no adapter in the folder."""
        finished = filter(self._is_finished, self._finals())
        return sum(not (self.folder.adapters / point.name).is_dir() for point in finished)

    def waiting(self) -> list[MethodEntry]:
        """Return the methods whose tuning runs are not all here yet."""
        return [e for e in self.comparison.config.entries() if not self._settled(e)]

    def _finals(self) -> list[Point]:
        return [point for _, point in self._final_slots() if point is not None]

    def _final_slots(self) -> list[tuple[MethodEntry, Point | None]]:
        """Return this part's final runs by method; None where the rate is not chosen (yet)."""
        config, slots = self.comparison.config, []
        rates = [
            (entry, self.comparison.chosen(entry, self.folder) if self._settled(entry) else None)
            for entry in config.entries()
        ]
        for place in range(len(config.final_seeds)):
            for entry, rate in turned(rates, place):
                slots.append((entry, rate and self.comparison.final(entry, rate)[place]))
        return self._mine(slots)

    def _mine(self, points: list[Any]) -> list[Any]:
        number, count = self.comparison.config.part
        return points[number::count]

    def _settled(self, entry: MethodEntry) -> bool:
        """Whether every tuning run of a method has finished, or failed for now."""
        return all(
            self._is_finished(point)
            or (
                (point.name in self._attempted or point.name not in self._own_tuning)
                and self._record(point) is not None
            )
            for point in self.comparison.tuning_of(entry)
        )

    def _is_finished(self, point: Point) -> bool:
        if point.name not in self._finished:
            record = self._record(point)
            if record is None or record["status"] != "finished":
                return False
            self._finished.add(point.name)
        return True

    def _record(self, point: Point) -> dict[str, Any] | None:
        """Return a run's record; another part's that cannot be read may be half copied: None."""
        try:
            return self.folder.record(point.name)
        except ArtifactError:
            if point.phase == "final" or point.name in self._own_tuning:
                raise
            return None


def turned(items: Sequence[T], number: int) -> list[T]:
    """Return ``items`` from place ``number`` on, and then those before.

    Each round of runs begins with another method. The parts of a comparison are every n-th run,
    so this keeps a method from falling to one machine where n divides their number.
    """
    first = number % len(items)
    return [*items[first:], *items[:first]]


def experiment(config: CompareConfig) -> dict[str, Any]:
    """Return what all runs share, as plain JSON values: files by their content, no defaults."""
    files = {
        name: file_digest(path)
        for name, path in (
            ("train_file", config.train_file),
            ("test_file", config.test_file),
            ("validation", config.validation if isinstance(config.validation, str) else None),
        )
        if path
    }
    values = dataclasses.asdict(config)
    if values["data"]["overlap"] != "drop":
        # Whether rows are refused or allowed changes nothing in a run that is made.
        del values["data"]["overlap"], values["data"]["guard"]
    del values["data"]["guard_dir"]
    shared = _given(values, dataclasses.asdict(SharedConfig()))
    for name in ("model", "train_file", "adapter"):
        shared.pop(name, None)
    held_out = {"validation": config.validation, "validation_seed": config.validation_seed}
    split = held_out if not isinstance(config.validation, str) else {}
    # Every run has the other scores; answers are written only where they are what is compared.
    written = {"metric": EXACT_MATCH} if config.writes_answers else {}
    return shared | {"model": model_identity(config.model), "files": files} | split | written


def digest(value: Any) -> str:
    """Return a digest of plain JSON values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _given(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ``defaults`` whose value in ``values`` is another."""
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        value = values.get(name, default)
        if isinstance(default, dict) and default:
            if nested := _given(value, default):
                found[name] = nested
        elif value != default:
            found[name] = value
    return found
