"""The runs of a comparison, and which of them are ready or finished.

Tuning runs cover every method x learning rate x tuning seed. Final runs, a method x final seed,
wait for their method's tuning runs, which choose the learning rate. The final
seeds also run at the default learning rate of the first try, if there is one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tlora.compare import defaults
from tlora.compare.compareconfig import CompareConfig, MethodEntry
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.ratecurve import best_rate, geometric_median

Phase = Literal["tuning", "final"]
SCORED: dict[Phase, str] = {"tuning": "validation", "final": "test"}
"""The rows on which a run is scored."""
Scores = Mapping[float, Sequence[float | None]]
"""Validation scores by learning rate, one value per finished tuning seed; None: the run failed or
its score is not a number."""


@dataclass(frozen=True)
class Trial:
    """One run: a method at a learning rate with a seed."""

    entry: MethodEntry
    learning_rate: float
    seed: int
    phase: Phase
    name: str
    """Name of its files: readable, ending in a digest of everything that defines the run."""

    def record(self) -> dict[str, Any]:
        """Return the part of the record known before the run starts."""
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
    """A comparison, with the data that identifies its runs.

    Two machines with the same rows and model agree on every name, regardless of paths.
    """

    config: CompareConfig
    metric: str
    better: str
    experiment: str
    """Digest of the settings shared by all runs: model, rows, steps, schedule, batch."""
    changed: Mapping[str, dict[str, Any]] | None = None
    """`changed_defaults` by method at the start of the comparison; None: current ones."""
    first_try: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)
    """By label, other comparisons that have the method, and its best learning rate there."""

    def tuning(self) -> list[Trial]:
        """Return the tuning runs, seeds outermost, so that partial results are balanced."""
        entries, seeds = self.config.entries(), self.config.tuning_seeds
        places = range(len(entries[0].learning_rates))
        return [
            self._trial(entry, entry.learning_rates[place], seed, "tuning")
            for seed, place, entry in itertools.product(seeds, places, entries)
        ]

    def tuning_of(self, entry: MethodEntry) -> list[Trial]:
        """Return the tuning runs of one method."""
        return [
            self._trial(entry, learning_rate, seed, "tuning")
            for learning_rate in entry.learning_rates
            for seed in self.config.tuning_seeds
        ]

    def final(self, entry: MethodEntry, learning_rate: float) -> list[Trial]:
        """Return the final runs of a method at the chosen learning rate."""
        seeds = self.config.final_seeds
        return [self._trial(entry, learning_rate, seed, "final") for seed in seeds]

    def score(self, record: dict[str, Any] | None) -> float | None:
        """Return the compared score: on the test rows for a final run, else on the validation
        rows."""
        if record is None or record["status"] != "finished":
            return None
        return record["scores"].get(SCORED[record["phase"]], {}).get(self.metric)

    def chosen(self, entry: MethodEntry, folder: CompareFolder) -> float | None:
        """Return the learning rate chosen by the tuning runs; None while some are missing."""
        scores: dict[float, list[float | None]] = {}
        for trial in self.tuning_of(entry):
            record = folder.record(trial.name)
            if record is None:
                return None
            scores.setdefault(trial.learning_rate, []).append(self.score(record))
        return best_rate(mean_scores(scores, len(self.config.tuning_seeds)), self.better)

    def default(self, entry: MethodEntry) -> float | None:
        """Return the learning rate of the first try; None if no other comparison has the method."""
        rates = [rate for _, rate in self.first_try.get(entry.label, ())]
        return geometric_median(rates) if rates else None

    def final_rates(self, entry: MethodEntry, folder: CompareFolder) -> list[float]:
        """Return the learning rates of the final runs: the chosen one and the first try's."""
        rates = (self.chosen(entry, folder), self.default(entry))
        return [*dict.fromkeys(rate for rate in rates if rate is not None)]

    def _trial(self, entry: MethodEntry, learning_rate: float, seed: int, phase: Phase) -> Trial:
        given = entry.given(None if self.changed is None else self.changed.get(entry.name, {}))
        defining = [self.experiment, entry.name, given, learning_rate, seed, phase]
        if entry.calibration:
            defining.append(entry.calibration)
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", entry.name)
        name = f"{readable}-lr{learning_rate:g}-seed{seed}-{phase}-{digest(defining)[:8]}"
        return Trial(entry, learning_rate, seed, phase, name)


class Schedule:
    """Order of the runs.

    Finished runs are never repeated. Failed runs are retried once each time the comparison starts.
    """

    def __init__(self, comparison: Comparison, folder: CompareFolder) -> None:
        self.comparison = comparison
        self.folder = folder
        self._attempted: set[str] = set()
        self._finished: set[str] = set()
        self._tuning = comparison.tuning()

    def __iter__(self) -> Iterator[Trial]:
        """Yield the runs that are ready, tuning runs first."""
        for trial in [*self._tuning, *self._finals()]:
            if trial.name not in self._attempted and not self._is_finished(trial):
                yield trial

    def next(self) -> Trial | None:
        """Return the next run to start, each only once, or None if none is ready."""
        trial = next(iter(self), None)
        if trial is not None:
            self._attempted.add(trial.name)
            # A failed run that is being retried is not settled.
            self.folder.record_file(trial.name).unlink(missing_ok=True)
        return trial

    def counts(self) -> tuple[int, int]:
        """Return the number of finished runs and the total.

        A method without a valid learning rate has no final runs.
        """
        known = [*self._tuning, *self._finals()]
        config = self.comparison.config
        waiting = sum(not self._settled(entry) for entry in config.entries())
        return sum(map(self._is_finished, known)), len(known) + waiting * len(config.final_seeds)

    def _finals(self) -> list[Trial]:
        """Return the final runs of the methods whose learning rate is chosen, by seed."""
        runs = [
            self.comparison.final(entry, rate)
            for entry in filter(self._settled, self.comparison.config.entries())
            for rate in self.comparison.final_rates(entry, self.folder)
        ]
        return [trial for round_ in zip(*runs, strict=True) for trial in round_]

    def _settled(self, entry: MethodEntry) -> bool:
        """Whether every tuning run of a method has finished or failed."""
        return all(
            self._is_finished(trial)
            or (trial.name in self._attempted and self.folder.record(trial.name) is not None)
            for trial in self.comparison.tuning_of(entry)
        )

    def _is_finished(self, trial: Trial) -> bool:
        if trial.name not in self._finished:
            record = self.folder.record(trial.name)
            if record is None or record["status"] != "finished":
                return False
            self._finished.add(trial.name)
        return True


def mean_scores(scores: Scores, seeds: int) -> dict[float, float]:
    """Return the mean score of every learning rate with scores from all ``seeds`` runs.

    Another mean would be over fewer seeds.
    """
    return {
        learning_rate: statistics.fmean(value for value in values if value is not None)
        for learning_rate, values in scores.items()
        if len(values) - values.count(None) == seeds
    }


def saved(folder: CompareFolder) -> Comparison:
    """Return the comparison of a folder: it needs neither model nor rows.

    Raises:
        ArtifactError: there is none, or its file is damaged.
    """
    start = folder.read()
    # Fields that did not exist yet have the value that means "as before".
    data = defaults.SHARED["data"] | start["config"].get("data", {})
    config = CompareConfig.from_dict(start["config"] | {"data": data})
    return Comparison(
        config,
        *(start[name] for name in ("metric", "better", "experiment")),
        *(start.get(name, {}) for name in ("defaults", "first_try")),
    )


def digest(value: Any) -> str:
    """Return a digest of plain JSON values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
