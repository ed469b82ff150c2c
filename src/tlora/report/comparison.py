"""Results of a comparison's runs as plain data for the page and the tables."""

from __future__ import annotations

import functools
import itertools
import operator
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlora.compare.compareconfig import CompareConfig, MethodEntry
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.ratecurve import width
from tlora.compare.trials import Comparison, Trial, mean_scores, saved
from tlora.errors import ArtifactError
from tlora.report.intervals import Difference, Interval, difference, holm, interval

Record = dict[str, Any]
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class MissingRun:
    """A run without a score, and the reason."""

    run: str
    cause: str
    last_lines: Sequence[str] = ()


@dataclass(frozen=True)
class MethodResult:
    """One method of the comparison."""

    entry: MethodEntry
    trials: list[Trial]
    """Number of its runs known so far."""
    learning_rate: float | None
    """The learning rate chosen on validation rows; None if not chosen yet."""
    tuning: dict[float, list[float | None]]
    """Validation scores by learning rate, one value per tuning seed."""
    tuning_means: dict[float, float]
    finals: dict[int, Record]
    """Finished final runs by seed."""
    scores: dict[int, float]
    """Test scores by seed."""
    problems: list[MissingRun] = field(default_factory=list)
    width: tuple[float, bool] | None = None
    """Range of learning rates close to the best, as `tlora.compare.ratecurve.width` gives it."""
    first_try: dict[int, float] = field(default_factory=dict)
    """Test scores by seed at the default learning rate."""

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.entry.label

    @property
    def score(self) -> Interval | None:
        """Mean and interval of the test scores."""
        return interval([*self.scores.values()]) if self.scores else None

    @property
    def edge(self) -> str | None:
        """ "lowest" or "highest" if the chosen learning rate is at that end of the range tried."""
        tried = self.entry.learning_rates
        ends = {tried[0]: "lowest", tried[-1]: "highest"} if len(tried) > 1 else {}
        return None if self.learning_rate is None else ends.get(self.learning_rate)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters; 0 if no final run has a score."""
        means = (self.mean("parameters", what) for what in ("adapter", "others"))
        return sum(round(mean or 0) for mean in means)

    @property
    def memory(self) -> int | None:
        """Peak memory in bytes, maximum over seeds."""
        return max((r["memory"]["bytes"] for r in self.finals.values()), default=None)

    @property
    def plan(self) -> dict[str, dict[str, float]] | None:
        """Rank and scale by module for the lowest final seed, if the method plans them."""
        return next((r["plan"] for _, r in sorted(self.finals.items()) if r.get("plan")), None)

    def mean(self, *path: str) -> float | None:
        """Return the mean over seeds of the final runs' value at a path of keys."""
        values: list[Any] = [
            functools.reduce(operator.getitem, path, r) for r in self.finals.values()
        ]
        return statistics.fmean(values) if values else None

    def curve(self, name: str) -> Curve:
        """Return the mean over seeds of a curve, at the steps shared by all seeds."""
        curves = [dict(map(tuple, r["curves"].get(name, []))) for r in self.finals.values()]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        values = ((step, [curve[step] for curve in curves]) for step in steps)
        return [(s, statistics.fmean(v)) for s, v in values if None not in v]


@dataclass(frozen=True)
class Results:
    """A whole comparison, finished or not."""

    comparison: Comparison
    methods: list[MethodResult]
    """Methods, best test score first; then those that lack a final seed, and last those without a
    score, in the order of the file."""
    differences: dict[tuple[str, str], Difference]
    """Differences by pair of labels, higher-ranked method first."""
    holding: set[tuple[str, str]]
    """Pairs whose difference remains significant when all pairs are tested together (Holm)."""
    records: list[Record]
    """All finished runs of this comparison."""
    labels: dict[str, str]
    """Label of the method for every run, finished or not, by run name."""

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
        """Return first minus second, regardless of the stored order of the pair."""
        kept = self.differences.get((first, second))
        turned = self.differences.get((second, first))
        if turned is None:
            return kept
        i = turned.interval
        low, high = (None if end is None else -end for end in (i.high, i.low))
        return Difference(Interval(-i.mean, low, high, i.count), turned.p, -turned.better)

    def holds(self, first: str, second: str) -> bool:
        """Whether the pair's difference, in either order, is in `held`."""
        return not self.holding.isdisjoint({(first, second), (second, first)})

    def values(self, *path: str) -> list[Any]:
        """Return the distinct values of the runs at a path of keys."""

        def at(record: Any) -> Any:
            for key in path:
                record = (record or {}).get(key)
            return record

        return [*dict.fromkeys(map(at, self.records))]


def gather(comparison: Comparison, folder: CompareFolder) -> Results:
    """Read the runs of ``comparison`` from ``folder``.

    Raises:
        ArtifactError: a file is damaged, or two runs were trained differently.
    """
    methods = [_method(comparison, entry, folder) for entry in comparison.config.entries()]
    runs = [(trial, m.label) for m in methods for trial in m.trials if trial.phase == "tuning"]
    sign = -1.0 if comparison.better == "higher" else 1.0
    # Do not rank means over different seeds: a method would gain by failing at a bad seed.
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
    # A pair without a p-value still counts as a comparison.
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
    """Read a comparison from its folder alone, without the model or rows.

    Raises:
        ArtifactError: there is none, a file is damaged, or two runs were trained differently.
    """
    return gather(saved(folder), folder)


def check_alike(records: Iterable[Record]) -> None:
    """Check that runs saw the same number of rows and steps, in the same order for one seed.

    Also checks the precision, whose default depends on the hardware.

    Raises:
        ArtifactError: two runs differ.
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
                    f"{record['name']} and {by} were trained differently: {key[0]} {value!r} and"
                    f" {held!r}; remove one of the files and rerun the comparison."
                )


def _method(comparison: Comparison, entry: MethodEntry, folder: CompareFolder) -> MethodResult:
    trials = comparison.tuning_of(entry)
    problems = _problems(comparison, entry, trials, folder)
    tuning: dict[float, list[float | None]] = {}
    for trial in trials:
        score = comparison.score(folder.record(trial.name))
        tuning.setdefault(trial.learning_rate, []).append(score)
    learning_rate = comparison.chosen(entry, folder)
    if learning_rate is None:
        reason = (
            "no learning rate has a score at every tuning seed"
            if all(folder.record(trial.name) for trial in trials)
            else "not all tuning runs are here to choose the learning rate"
        )
        problems.append(MissingRun(f"{entry.label}, all final runs", reason))
    for rate in comparison.final_rates(entry, folder):
        final = comparison.final(entry, rate)
        problems += _problems(comparison, entry, final, folder)
        trials = [*trials, *final]
    means = mean_scores(tuning, len(comparison.config.tuning_seeds))
    finals, scores = _scored(comparison, entry, learning_rate, folder)
    _, first_try = _scored(comparison, entry, comparison.default(entry), folder)
    wide = width({rate: means.get(rate) for rate in tuning}, comparison.better)
    return MethodResult(
        entry, trials, learning_rate, tuning, means, finals, scores, problems, wide, first_try
    )


def _scored(
    comparison: Comparison, entry: MethodEntry, rate: float | None, folder: CompareFolder
) -> tuple[dict[int, Record], dict[int, float]]:
    """Return the final runs at a learning rate that have a score, and their scores, by seed."""
    finals: dict[int, Record] = {}
    scores: dict[int, float] = {}
    for trial in comparison.final(entry, rate) if rate is not None else ():
        record = folder.record(trial.name)
        score = comparison.score(record)
        if record is not None and score is not None:
            finals[trial.seed], scores[trial.seed] = record, score
    return finals, scores


def _problems(
    comparison: Comparison, entry: MethodEntry, trials: Sequence[Trial], folder: CompareFolder
) -> list[MissingRun]:
    """Return the reason why each of ``trials`` has no score, grouping those not run yet."""
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
