"""What the runs of a comparison say: plain data for the page and the tables, nothing drawn."""

from __future__ import annotations

import functools
import itertools
import operator
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlora.compare import defaults
from tlora.compare.compareconfig import CompareConfig, MethodEntry
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.trials import Comparison, Trial, mean_scores
from tlora.errors import ArtifactError
from tlora.report.intervals import Difference, Interval, difference, holm, interval

Record = dict[str, Any]
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class MissingRun:
    """A run that has no score, and why."""

    run: str
    cause: str
    last_lines: Sequence[str] = ()


@dataclass(frozen=True)
class MethodResult:
    """One method of the comparison."""

    entry: MethodEntry
    trials: list[Trial]
    """Its runs, as far as they are known."""
    learning_rate: float | None
    """The one that validation chose; None while it has not."""
    tuning: dict[float, list[float | None]]
    """Validation scores by learning rate, a value for each tuning seed."""
    tuning_means: dict[float, float]
    finals: dict[int, Record]
    """Finished final runs by seed."""
    scores: dict[int, float]
    """Test scores by seed."""
    problems: list[MissingRun] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.entry.label

    @property
    def score(self) -> Interval | None:
        """Mean and interval of the test scores."""
        return interval([*self.scores.values()]) if self.scores else None

    @property
    def edge(self) -> str | None:
        """ "lowest" or "highest" if the chosen learning rate is at that end of those tried."""
        tried = self.entry.learning_rates
        ends = {tried[0]: "lowest", tried[-1]: "highest"} if len(tried) > 1 else {}
        return None if self.learning_rate is None else ends.get(self.learning_rate)

    @property
    def parameters(self) -> int:
        """All trainable parameters; 0 where no final run has a score."""
        means = (self.mean("parameters", what) for what in ("adapter", "others"))
        return sum(round(mean or 0) for mean in means)

    @property
    def memory(self) -> int | None:
        """Peak memory in bytes, the largest of the seeds."""
        return max((r["memory"]["bytes"] for r in self.finals.values()), default=None)

    @property
    def plan(self) -> dict[str, dict[str, float]] | None:
        """Rank and scale by module, of the lowest final seed, if the method plans them."""
        return next((r["plan"] for _, r in sorted(self.finals.items()) if r.get("plan")), None)

    def mean(self, *path: str) -> float | None:
        """Return the mean over seeds of what the final runs have at a path of keys."""
        values: list[Any] = [
            functools.reduce(operator.getitem, path, r) for r in self.finals.values()
        ]
        return statistics.fmean(values) if values else None

    def curve(self, name: str) -> Curve:
        """Return the mean over seeds of a curve, at the steps that all seeds have."""
        curves = [dict(map(tuple, r["curves"].get(name, []))) for r in self.finals.values()]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        values = ((step, [curve[step] for curve in curves]) for step in steps)
        return [(s, statistics.fmean(v)) for s, v in values if None not in v]


@dataclass(frozen=True)
class Results:
    """A whole comparison, finished or not."""

    comparison: Comparison
    methods: list[MethodResult]
    """Best test score first; those that lack a final seed after all that do not, and those
    without a score last, in the order of the file."""
    differences: dict[tuple[str, str], Difference]
    """By pair of labels, better placed method first."""
    holding: set[tuple[str, str]]
    """Pairs whose difference holds when all pairs are tested together (Holm)."""
    records: list[Record]
    """All finished runs of this comparison."""
    labels: dict[str, str]
    """Of every run, finished or not, by its name: the label of its method."""

    @property
    def config(self) -> CompareConfig:
        """The comparison's configuration."""
        return self.comparison.config

    @property
    def chosen(self) -> bool:
        """Whether every method has its learning rate."""
        return all(method.learning_rate is not None for method in self.methods)

    @property
    def problems(self) -> list[MissingRun]:
        """Every run without a score."""
        return [problem for method in self.methods for problem in method.problems]

    def find(self, first: str, second: str) -> Difference | None:
        """Return first minus second, whichever way round the pair is kept."""
        kept = self.differences.get((first, second))
        turned = self.differences.get((second, first))
        if turned is None:
            return kept
        i = turned.interval
        low, high = (None if end is None else -end for end in (i.high, i.low))
        return Difference(Interval(-i.mean, low, high, i.count), turned.p, -turned.better)

    def holds(self, first: str, second: str) -> bool:
        """Whether the pair's difference, either way round, holds when all pairs are tested."""
        return not self.holding.isdisjoint({(first, second), (second, first)})

    def values(self, *path: str) -> list[Any]:
        """Return what the runs have at a path of keys, each value once."""

        def at(record: Any) -> Any:
            for key in path:
                record = (record or {}).get(key)
            return record

        return [*dict.fromkeys(map(at, self.records))]


def gather(comparison: Comparison, folder: CompareFolder) -> Results:
    """Read the runs of ``comparison`` from ``folder``.

    Raises:
        ArtifactError: a file is damaged, or two runs were not trained alike.
    """
    methods = [_method(comparison, entry, folder) for entry in comparison.config.entries()]
    runs = [(trial, m.label) for m in methods for trial in m.trials if trial.phase == "tuning"]
    sign = -1.0 if comparison.better == "higher" else 1.0
    # Means over other seeds are not in one order: who failed at a bad seed would gain by it.
    methods.sort(key=lambda m: (-len(m.scores), sign * m.score.mean if m.score else 0.0))
    runs += [(trial, m.label) for m in methods for trial in m.trials if trial.phase == "final"]
    labels = {trial.name: label for trial, label in runs}
    records = [r for r in map(folder.record, labels) if r and r["status"] == "finished"]
    check_alike(records)
    differences = {
        (first.label, second.label): made
        for first, second in itertools.combinations(methods, 2)
        if (made := difference(first.scores, second.scores, comparison.better)) is not None
    }
    # A pair without a p-value is one of those looked at all the same.
    held = holm([1.0 if made.p is None else made.p for made in differences.values()])
    return Results(
        comparison=comparison,
        methods=methods,
        differences=differences,
        holding=set(itertools.compress(differences, held)),
        records=records,
        labels=labels,
    )


def read(folder: CompareFolder) -> Results:
    """Read a comparison from its folder alone: neither model nor rows are needed.

    Raises:
        ArtifactError: there is none, a file is damaged, or two runs were not trained alike.
    """
    start = folder.read()
    # Fields that did not exist yet have the value that means "as before".
    data = defaults.SHARED["data"] | start["config"].get("data", {})
    config = CompareConfig.from_dict(start["config"] | {"data": data})
    comparison = Comparison(
        config, start["metric"], start["better"], start["experiment"], start.get("defaults", {})
    )
    return gather(comparison, folder)


def check_alike(records: Iterable[Record]) -> None:
    """Check that runs saw as many rows in as many steps, and those of a seed in the same order.

    The precision is among what is checked: by default it is what the hardware has.

    Raises:
        ArtifactError: two did not.
    """
    first: dict[tuple[str, Any], tuple[Any, str]] = {}
    for record in records:
        size = (record["steps"], record["batch"], record["rows"]["train"])
        seen: dict[tuple[str, Any], Any] = {("steps, batch and training rows", None): size}
        if "autocast" in record:
            seen["autocast", None] = record["autocast"]
        if record["data_order"] is not None:
            seen["order of the rows", record["seed"]] = record["data_order"]
        for key, value in seen.items():
            held, by = first.setdefault(key, (value, record["name"]))
            if held != value:
                raise ArtifactError(
                    f"{record['name']} and {by} were not trained alike: {key[0]} {value!r} and"
                    f" {held!r}; remove one of the files and run the comparison again."
                )


def _method(comparison: Comparison, entry: MethodEntry, folder: CompareFolder) -> MethodResult:
    trials = comparison.tuning_of(entry)
    problems = _problems(comparison, entry, trials, folder)
    tuning: dict[float, list[float | None]] = {}
    for trial in trials:
        score = comparison.score(folder.record(trial.name))
        tuning.setdefault(trial.learning_rate, []).append(score)
    learning_rate = comparison.chosen(entry, folder)
    finals: dict[int, Record] = {}
    scores: dict[int, float] = {}
    if learning_rate is None:
        reason = (
            "no learning rate has a score at every tuning seed"
            if all(folder.record(trial.name) for trial in trials)
            else "not all tuning runs are here to choose the learning rate"
        )
        problems.append(MissingRun(f"{entry.label}, all final runs", reason))
    else:
        final = comparison.final(entry, learning_rate)
        problems += _problems(comparison, entry, final, folder)
        for trial in final:
            record = folder.record(trial.name)
            score = comparison.score(record)
            if record is not None and score is not None:
                finals[trial.seed], scores[trial.seed] = record, score
        trials = [*trials, *final]
    means = mean_scores(tuning, len(comparison.config.tuning_seeds))
    return MethodResult(entry, trials, learning_rate, tuning, means, finals, scores, problems)


def _problems(
    comparison: Comparison, entry: MethodEntry, trials: Sequence[Trial], folder: CompareFolder
) -> list[MissingRun]:
    """Return why each of ``trials`` has no score; those that have not run yet together."""
    problems, missing = [], 0
    for trial in trials:
        record = folder.record(trial.name)
        at = f"learning rate {trial.learning_rate:g}, seed {trial.seed}"
        run = f"{entry.label}, {trial.phase} run, {at}"
        if record is None:
            missing += 1
        elif record["status"] != "finished":
            error = record["error"]
            problems.append(MissingRun(run, f"failed, {error['cause']}", error["last_lines"]))
        elif record.get("diverged") is not None:
            problems.append(MissingRun(run, f"the training diverged at step {record['diverged']}"))
        elif comparison.score(record) is None:
            problems.append(MissingRun(run, "its score is not a number: the training diverged"))
    if missing:
        run = f"{entry.label}, {missing} of {len(trials)} {trials[0].phase} runs"
        problems.append(MissingRun(run, "not run yet"))
    return problems
