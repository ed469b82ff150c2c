"""What a user gets who tries each method once, at one default learning rate.

    python benchmarks/quality/firsttry.py

reads the committed tuning runs, which score every method at three to five learning rates on the
validation rows. A method's default for a task is chosen on the other tasks and never on this one:
it is the geometric median of the best learning rates there. Between two learning rates that were
tried, the score is interpolated linearly over the logarithm of the rate. Beyond them the score of
the outermost rate stands, marked *, because nothing is known there. A default next to a run that
diverged has no score.

A method forgives a wrong rate if many rates come within 5 % of its best score: the second table
gives that range as a factor, with > where it reaches an end of the rates that were tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from bisect import bisect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tlora.compare.comparefolder import CompareFolder
from tlora.compare.firsttry import method_of
from tlora.compare.ratecurve import Curve, best_rate, geometric_median, width
from tlora.compare.trials import saved
from tlora.report.comparison import Results, gather
from tlora.report.numbers import times

QUALITY = Path(__file__).parent

TABLES = {
    "base-ledger": ("embedded base", "ledger", "loss"),
    "base-program": ("embedded base", "program", "loss"),
    "base-spelled": ("embedded base", "spelled", "loss"),
    "text30m-ledger": ("base of 30M", "ledger", "loss"),
    "text30m-program": ("base of 30M", "program", "loss"),
    "text30m-spelled": ("base of 30M", "spelled", "loss"),
    "text30m-gsm8k": ("base of 30M", "gsm8k", "loss"),
    "text30m-code": ("base of 30M", "code", "loss"),
    "tinystories-gsm8k": ("tinystories", "gsm8k", "loss"),
    "tinystories-code": ("tinystories", "code", "loss"),
    "minilm-stsb": ("MiniLM", "stsb", "pearson"),
    "minilm-sst2": ("MiniLM", "sst2", "accuracy"),
    "smollm2-equations": ("SmolLM2", "equations", "loss"),
    "smollm2-sst2": ("SmolLM2", "sst2", "loss"),
    "smollm2-gsm8k": ("SmolLM2", "gsm8k", "loss"),
}
"""Folder of a comparison: its base, its task, the score."""

_EQUAL = {"allocate_rank": False, "allocate_scale": False}
_WN = _EQUAL | {"basis": "weight-gradient-moment"}
METHODS = {
    "LoRA": ("lora", {}),
    "LoRA-FA": ("lora-fa", {}),
    "PiSSA": ("pissa", {}),
    "LoRA-GA": ("lora-ga", {}),
    "the paper's rule": ("tlora", {}),
    "TLoRA, equal": ("tlora", _EQUAL),
    "W N, equal": ("tlora", _WN),
    "W N, A trained": ("tlora", _WN | {"freeze_a": False}),
}
"""What a method is called here: its name and its options."""


@dataclass(frozen=True)
class Task:
    """The tuning runs of one table."""

    base: str
    name: str
    better: str
    curves: Mapping[str, Curve]


def read(quality: Path = QUALITY) -> dict[str, Task]:
    """Return the tables by folder, with the methods that have been tuned there."""
    found = {}
    for name, (base, task, score) in TABLES.items():
        folder = CompareFolder(quality / name)
        if folder.exists:
            better = "lower" if score == "loss" else "higher"
            made = dataclasses.replace(saved(folder), metric=score, better=better)
            if known := curves(gather(made, folder)):
                found[name] = Task(base, task, better, known)
    return found


def curves(results: Results) -> dict[str, Curve]:
    """Return the curve of each method of `METHODS` that is tuned, with the table's own options."""
    common = results.config.adapter.items()
    found = {}
    for result in results.methods:
        own = all(result.entry.adapter.get(name, value) == value for name, value in common)
        if not own or result.entry.calibration or result.learning_rate is None:
            continue
        method = method_of(result.entry, results.comparison.changed)[:2]
        for label in (label for label, known in METHODS.items() if known == method):
            found[label] = {rate: result.tuning_means.get(rate) for rate in result.tuning}
    return found


@dataclass(frozen=True)
class FirstTry:
    """A method on one task."""

    rate: float
    score: float | None
    tried: bool
    """Whether the default lies within the rates that were tried."""
    tuned: float
    excess: float | None
    """How much worse than the task's best score of all methods, as a share of it."""
    width: tuple[float, bool] | None


def score_at(curve: Curve, rate: float) -> tuple[float | None, bool]:
    """Return the score at a learning rate, and whether the rate is within those that were tried.

    Returns:
        The score interpolated linearly over the logarithm of the rate; outside the rates that were
        tried, the score of the nearest; None next to a rate without a score.
    """
    rates = sorted(curve)
    if rate in curve:
        return curve[rate], True
    place = bisect(rates, rate)
    if place in (0, len(rates)):
        return curve[rates[min(place, len(rates) - 1)]], False
    low, high = rates[place - 1], rates[place]
    below, above = curve[low], curve[high]
    if below is None or above is None:
        return None, True
    return below + math.log(rate / low) / math.log(high / low) * (above - below), True


def first_tries(tasks: Mapping[str, Task], same_base: bool) -> dict[str, dict[str, FirstTry]]:
    """Return by table and method what the default of the other tasks gives.

    Args:
        tasks: the tables.
        same_base: choose on the other tasks of the same base alone; else on all tables of other
            tasks, those of this task on other bases left out too.
    """
    found: dict[str, dict[str, FirstTry]] = {}
    for folder, task in tasks.items():
        tuned = {
            label: curve[best_rate(curve, task.better)] for label, curve in task.curves.items()
        }
        top = (max if task.better == "higher" else min)(tuned.values())
        others = [
            each
            for each in tasks.values()
            if each.name != task.name and (not same_base or each.base == task.base)
        ]
        row = {}
        for label, curve in task.curves.items():
            rates = [best_rate(o.curves[label], o.better) for o in others if label in o.curves]
            if not rates:
                continue
            rate = geometric_median(rates)
            score, tried = score_at(curve, rate)
            excess = None if score is None else abs(score - top) / top
            wide = width(curve, task.better)
            row[label] = FirstTry(rate, score, tried, tuned[label], excess, wide)
        found[folder] = row
    return found


def ranks(row: Mapping[str, float]) -> dict[str, float]:
    """Return the rank of each method, 1 the lowest value; equal values share their mean rank."""
    return {
        label: statistics.fmean(
            place for place, each in enumerate(sorted(row.values()), start=1) if each == value
        )
        for label, value in row.items()
    }


def mean_ranks(
    tasks: Mapping[str, Task], tries: Mapping[str, Mapping[str, FirstTry]], tuned: bool
) -> dict[str, float]:
    """Return each method's mean rank over the tables, among the methods that all tables have.

    A default without a score comes last.
    """
    common = set.intersection(*({*row} for row in tries.values()))
    found = defaultdict(list)
    for folder, row in tries.items():
        sign = -1.0 if tasks[folder].better == "higher" else 1.0
        values = {}
        for label in common:
            score = row[label].tuned if tuned else row[label].score
            values[label] = math.inf if score is None else sign * score
        for label, rank in ranks(values).items():
            found[label].append(rank)
    return {label: statistics.fmean(each) for label, each in found.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--same_base", action="store_true", help="choose on tasks of the same base")
    arguments = parser.parse_args()
    tasks = read()
    tries = {f: row for f, row in first_tries(tasks, arguments.same_base).items() if row}
    labels = [label for label in METHODS if any(label in row for row in tries.values())]
    print("Score at the default (how much worse than the task's best), tuned, default rate\n")
    _table(tries, labels, _cell)
    print("\nRange of learning rates within 5 % of the method's best score, as a factor\n")
    _table(tries, labels, lambda t: times(t.width))
    print("\nOver the tables\n")
    _summary(tasks, tries, labels)


def _cell(each: FirstTry) -> str:
    if each.score is None:
        return f"diverged, {each.tuned:.3f}, {each.rate:.1e}"
    mark = "" if each.tried else "*"
    return f"{each.score:.3f}{mark} ({100 * each.excess:+.0f} %), {each.tuned:.3f}, {each.rate:.1e}"


def _table(tries, labels, cell) -> None:
    print("|".join(["", "", *labels, ""]))
    print("|---" * (len(labels) + 1) + "|")
    for folder, row in tries.items():
        cells = [cell(row[label]) if label in row else "" for label in labels]
        print(f"| {' | '.join([folder, *cells])} |")


def _summary(tasks, tries, labels) -> None:
    at_default, tuned = (mean_ranks(tasks, tries, tuned) for tuned in (False, True))
    print("| | tables | rank, first try | rank, tuned | median excess | worst | median width |")
    print("|---|---|---|---|---|---|---|")
    for label in labels:
        rows = [row[label] for row in tries.values() if label in row]
        excess = [math.inf if each.excess is None else each.excess for each in rows]
        rank = [f"{each[label]:.1f}" if label in each else "" for each in (at_default, tuned)]
        print(
            f"| {label} | {len(rows)} | {rank[0]} | {rank[1]} |"
            f" {100 * statistics.median(excess):.0f} % | {100 * max(excess):.0f} % |"
            f" {statistics.median(each.width[0] for each in rows if each.width):.1f} |"
        )


if __name__ == "__main__":
    main()
