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
import itertools
import json
import math
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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

_SIZES = {"r", "lora_alpha", "exclude_modules", "modules_to_save"}
"""Options that a table shares, and which make no other method."""

_LEAST = 3
"""Learning rates with a score without which a method is left out of a table, as one that has not
run to the end."""

Curve = Mapping[float, float | None]
"""Mean score over the tuning seeds by learning rate; None where a seed diverged or failed."""


@dataclass(frozen=True)
class Task:
    """The tuning runs of one table."""

    base: str
    name: str
    higher: bool
    curves: Mapping[str, Curve]


def read(quality: Path = QUALITY) -> dict[str, Task]:
    """Return the tables by folder, with the methods that have been tuned there."""
    found = {}
    for folder, (base, name, score) in TABLES.items():
        runs = [json.loads(file.read_text()) for file in (quality / folder).glob("runs/*.json")]
        if runs:
            shared = json.loads((quality / folder / "compare.json").read_text())
            rank = shared["config"]["adapter"].get("r", 8)
            known = curves(runs, rank, score)
            whole = {label: curve for label, curve in known.items() if scored(curve) >= _LEAST}
            if whole:
                found[folder] = Task(base, name, score != "loss", whole)
    return found


def scored(curve: Curve) -> int:
    """Return at how many learning rates there is a score."""
    return len(curve) - [*curve.values()].count(None)


def curves(runs: Iterable[Mapping], rank: int, score: str) -> dict[str, Curve]:
    """Return the curve of each method of `METHODS` that ``runs`` has, at ``rank``.

    Args:
        runs: records of a comparison's runs; final ones are passed over.
        rank: that of the table; methods at other ranks are passed over.
        score: name of the validation score.
    """
    scores: dict[str, dict[float, list]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        options = {name: value for name, value in run["adapter"].items() if name not in _SIZES}
        known = [label for label, method in METHODS.items() if method == (run["method"], options)]
        if run["phase"] != "tuning" or run["calibration"] or run["adapter"].get("r", 8) != rank:
            continue
        for label in known:
            value = run.get("scores", {}).get("validation", {}).get(score)
            scores[label][run["learning_rate"]].append(value)
    return {
        label: {
            rate: None if None in values else statistics.fmean(values)
            for rate, values in sorted(by_rate.items())
        }
        for label, by_rate in scores.items()
    }


def best(curve: Curve, higher: bool) -> tuple[float, float]:
    """Return the best score and its learning rate; of equal scores the lowest rate.

    Raises:
        ValueError: no learning rate has a score.
    """
    sign = -1.0 if higher else 1.0
    score, rate = min((sign * score, rate) for rate, score in curve.items() if score is not None)
    return sign * score, rate


def default_rate(others: Iterable[tuple[Curve, bool]]) -> float | None:
    """Return the geometric median of the best learning rates; None of none.

    Args:
        others: a curve of each other task, and whether its higher scores are better.
    """
    logs = [math.log(best(curve, higher)[1]) for curve, higher in others]
    return math.exp(statistics.median(logs)) if logs else None


def score_at(curve: Curve, rate: float) -> tuple[float | None, bool]:
    """Return the score at a learning rate, and whether the rate is within those tried.

    Returns:
        The score interpolated over the logarithm of the rate, or that of the outermost rate; None
        next to a rate without one.
    """
    rates = sorted(curve)
    if rate in curve:
        return curve[rate], True
    place = bisect_right(rates, rate)
    if place in (0, len(rates)):
        near = rates[min(place, len(rates) - 1)]
        # What a rate was computed to by exp and log is still that rate.
        return curve[near], math.isclose(rate, near, rel_tol=1e-9)
    low, high = rates[place - 1], rates[place]
    below, above = curve[low], curve[high]
    if below is None or above is None:
        return None, True
    share = math.log(rate / low) / math.log(high / low)
    return below + share * (above - below), True


def width(curve: Curve, higher: bool, within: float = 0.05) -> tuple[float, bool]:
    """Return the range of rates around the best whose scores are close to it.

    Args:
        curve: the scores.
        higher: whether higher scores are better.
        within: share of the best score by which a score may be worse.

    Returns:
        The highest rate of the range over its lowest, and whether an end of it is an end of the
        rates that were tried, so that the range may be wider.
    """
    top, rate = best(curve, higher)
    limit = top * (1 - within if higher else 1 + within)
    rates = sorted(curve)
    place = rates.index(rate)
    low, low_open = _edge(curve, rates[place::-1], limit)
    high, high_open = _edge(curve, rates[place:], limit)
    return high / low, low_open or high_open


def _edge(curve: Curve, outward: list[float], limit: float) -> tuple[float, bool]:
    """Return where the score crosses ``limit``, and whether the tried rates end before that."""
    for inner, outer in itertools.pairwise(outward):
        near, far = curve[inner], curve[outer]
        if far is None:
            return inner, False
        if (near - limit) * (far - limit) < 0:
            share = (limit - near) / (far - near)
            return inner * (outer / inner) ** share, False
    return outward[-1], True


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
    width: float
    wider: bool


def first_tries(tasks: Mapping[str, Task], same_base: bool) -> dict[str, dict[str, FirstTry]]:
    """Return by table and method what the default of the other tasks gives.

    Args:
        tasks: the tables.
        same_base: choose on the other tasks of the same base alone; else on all tables of other
            tasks, those of this task on other bases left out too.
    """
    found: dict[str, dict[str, FirstTry]] = {}
    for folder, task in tasks.items():
        top = (max if task.higher else min)(
            best(curve, task.higher)[0] for curve in task.curves.values()
        )
        others = [
            each
            for each in tasks.values()
            if each.name != task.name and (not same_base or each.base == task.base)
        ]
        row = {}
        for label, curve in task.curves.items():
            rate = default_rate((o.curves[label], o.higher) for o in others if label in o.curves)
            if rate is None:
                continue
            score, tried = score_at(curve, rate)
            excess = None if score is None else (top - score if task.higher else score - top) / top
            spread, wider = width(curve, task.higher)
            tuned = best(curve, task.higher)[0]
            row[label] = FirstTry(rate, score, tried, tuned, excess, spread, wider)
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
        sign = -1.0 if tasks[folder].higher else 1.0
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
    _table(tries, labels, lambda t: f"{'>' * t.wider}{t.width:.1f}")
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
            f" {statistics.median(each.width for each in rows):.1f} |"
        )


if __name__ == "__main__":
    main()
