"""Sentences on a comparison's page."""

from __future__ import annotations

from collections.abc import Callable

from tlora.report.comparison import MethodResult, Results
from tlora.report.intervals import FEWEST, Difference
from tlora.report.numbers import count, number, seconds, signed, times

FIGURES: dict[str, Callable[[MethodResult], str]] = {
    "learning rate": lambda method: f"{method.learning_rate:g}",
    "rates within 5 %": lambda method: times(method.width),
    "adapter parameters": lambda method: count(method.mean("parameters", "adapter")),
    "other parameters": lambda method: count(method.mean("parameters", "others")),
    "peak MiB": lambda method: count(method.memory and method.memory / 2**20),
    "init s": lambda method: seconds(method.mean("seconds", "initialise")),
    "train s": lambda method: seconds(method.mean("seconds", "train")),
}
"""Table columns besides the scores, by title."""


def verdict(results: Results, first: str, second: str) -> str:
    """Return a sentence on whether two methods differ significantly."""
    found = results.find(first, second)
    if found is None:
        return f"{first} and {second} have no shared seed yet."
    if found.better == 0:
        return f"Tie: {first} minus {second} is {signed(found.interval.mean)}{_tie(found)}"
    winner, loser = (first, second) if found.better == 1 else (second, first)
    low, high = sorted(abs(end or 0.0) for end in (found.interval.low, found.interval.high))
    said = (
        f"{winner} is better than {loser} by {number(abs(found.interval.mean))} (95 % interval"
        f" {number(low)} to {number(high)}, {found.interval.count} seeds)."
    )
    pairs = len(results.differences)
    if pairs == 1:
        return said
    if results.holds(first, second):
        return f"{said} This also holds when all {pairs} pairs are tested together (Holm)."
    return f"{said} This does not hold when all {pairs} pairs are tested together (Holm)."


def _tie(found: Difference) -> str:
    """Return why a difference counts as a tie."""
    known = found.interval
    if known.low is None or known.high is None:
        return " at their only shared seed, which is not enough to tell them apart."
    if known.count < FEWEST:
        return f", but {known.count} seeds are not enough to tell them apart."
    if found.p is None:
        return " at every seed, which gives no estimate of the noise."
    return (
        f" (95 % interval {signed(known.low)} to {signed(known.high)}, {known.count} seeds)."
        " The interval contains zero, so the difference is not significant."
    )


def caveat(results: Results) -> str:
    """Return a note on the effect of multiple comparisons."""
    pairs = len(results.differences)
    if not pairs:
        return "No two methods have a shared seed yet."
    if pairs == 1:
        return "There is only one pair, so no correction is needed."
    return (
        f"With {pairs} pairs at 95 %, about {pairs / 20:.1f} would differ by chance if all methods"
        " were equal. Choose the pair in advance, or use the test of all pairs together."
    )


def summary(results: Results) -> str:
    """Summarize what the table shows and what it does not."""
    scored = {m.label: m for m in results.methods if m.score is not None}
    if not scored:
        return "No final run has a score."
    named = {
        label: f"{label} ({seeds})" if (seeds := of_seeds(results, method)) else label
        for label, method in scored.items()
    }
    best, *others = scored
    score = number(results.methods[0].score.mean if results.methods[0].score else None)
    said = f"{best}, {score}{named[best].removeprefix(best)}."
    if not others:
        return f"Only one method has final scores: {said}"
    groups: dict[int, list[str]] = {0: [], 1: [], -1: []}
    for other in others:
        found = results.find(best, other)
        groups[found.better if found else 0].append(named[other])
    titles = (
        "No significant difference to",
        "Significantly better than (each pair tested alone)",
        "Worse on shared seeds than",
    )
    parts = [
        f" {title}: {', '.join(labels)}."
        for title, labels in zip(titles, groups.values(), strict=True)
        if labels
    ]
    return f"Best mean: {said}{''.join(parts)}"


def of_seeds(results: Results, method: MethodResult) -> str:
    """Return "3 of 5 seeds", or "" if none is missing."""
    has, wanted = len(method.scores), len(results.config.final_seeds)
    return "" if has == wanted else f"{has} of {wanted} seeds"


def edges(results: Results) -> list[str]:
    """Name methods that were best at an edge of the learning rates, or note a single one."""
    if all(len(m.entry.learning_rates) == 1 for m in results.methods):
        return ["Only one learning rate was tried, so scores and ranking only apply to that one."]
    said = []
    for end, side in (("lowest", "below"), ("highest", "above")):
        at_end = [f"{m.label} ({m.learning_rate:g})" for m in results.methods if m.edge == end]
        if at_end:
            said.append(
                f"Best at the {end} learning rate tried: {', '.join(at_end)}. The optimum may be"
                f" {side} it, so the method may be able to score better."
            )
    return said


def protocol(results: Results) -> list[str]:
    """Describe the protocol of the comparison, one or two sentences per item."""
    config, comparison = results.config, results.comparison
    rows = {k: v for r in results.records for k, v in r["rows"].items()}
    steps, batch = (next(iter(results.values(what)), None) for what in ("steps", "batch"))
    held = (
        f"the file {config.validation}"
        if isinstance(config.validation, str)
        else f"held out of the training file, equal for all runs (seed {config.validation_seed})"
    )
    seen = (
        "which were not used for tuning"
        if config.data.overlap != "allow"
        else 'which may overlap with training or validation rows (`data.overlap` is "allow")'
    )
    checked = (
        "Runs whose steps, batch or order differ are rejected."
        if None not in results.values("data_order")
        else "Runs whose steps or batch differ are rejected; the order of rows was not recorded"
        " (loader processes or packing)."
    )
    untaken = [f"{label} {', '.join(names)}" for label, names in config.untaken().items()]
    return [
        f"Task {config.task}, score {comparison.metric} ({comparison.better} is better);"
        f" {count(rows.get('train'))} training rows, {count(rows.get('validation'))} validation"
        f" rows ({held}), {count(rows.get('test'))} test rows.",
        f"All runs use the same rows, {count(steps)} steps of {count(batch)} rows, and the same"
        " schedule and optimizer settings; runs with the same seed also share the order of rows and"
        f" the initial head. {checked}",
        "Each method's learning rate has the best mean over the tuning seeds"
        f" ({', '.join(map(str, config.tuning_seeds))}) on the validation rows; ties go to the"
        " lowest learning rate. Intervals do not include the uncertainty of that choice.",
        "Rates within 5 %: the factor between the ends of the range around the best learning rate"
        " in which the mean validation score, interpolated over the logarithm of the rate, is at"
        " most 5 % worse; > if the range reaches an end of the rates tried.",
        f"The table reports other seeds ({', '.join(map(str, config.final_seeds))}) at that"
        f" learning rate, on the test rows, {seen}.",
        "Intervals are Student's over seeds, 95 %. They describe other seeds on these test rows,"
        " not other rows. Differences are paired by seed. A difference whose interval contains"
        " zero, or with fewer than three seeds, is a tie.",
        *([f"Common options that a method lacks: {'; '.join(untaken)}."] * bool(untaken)),
    ]
