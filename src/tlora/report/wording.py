"""What a comparison's page says in sentences."""

from __future__ import annotations

from typing import Any

from tlora.report import environment as machines
from tlora.report.comparison import MethodResult, Results
from tlora.report.numbers import NONE, count, number, signed
from tlora.report.statistics import FEWEST, Difference


def verdict(results: Results, first: str, second: str) -> str:
    """Say in a sentence whether two methods differ beyond the noise."""
    found = results.find(first, second)
    if found is None:
        return f"{first} and {second} have no seed in common yet."
    if found.better == 0:
        return _tie(first, second, found)
    winner, loser = (first, second) if found.better == 1 else (second, first)
    low, high = sorted(abs(end or 0.0) for end in (found.interval.low, found.interval.high))
    return (
        f"{winner} is better than {loser} by {number(abs(found.interval.mean))} (95 % interval"
        f" {number(low)} to {number(high)}, {found.interval.count} seeds)."
        f" {_together(results, first, second)}"
    )


def _tie(first: str, second: str, found: Difference) -> str:
    known = found.interval
    said = f"Tie: {first} minus {second} is {signed(known.mean)}"
    if known.low is None or known.high is None:
        return f"{said} at the one seed that both have, which cannot tell them apart."
    if known.count < FEWEST:
        return f"{said}, but {known.count} seeds cannot tell them apart."
    if found.p is None:
        return f"{said} at every seed, which says nothing of the noise."
    return (
        f"{said} (95 % interval {signed(known.low)} to {signed(known.high)}, {known.count} seeds)."
        " The interval holds zero: these seeds do not tell the two apart."
    )


def _together(results: Results, first: str, second: str) -> str:
    pairs = len(results.differences)
    if results.holds(first, second):
        return (
            f"It holds too when all {pairs} pairs are tested together (Holm)." if pairs > 1 else ""
        )
    return (
        f"That is this pair taken alone; when all {pairs} pairs are tested together (Holm) it does"
        " not hold."
    )


def caveat(results: Results) -> str:
    """Say what looking at many pairs does."""
    pairs = len(results.differences)
    if not pairs:
        return "No two methods have a seed in common yet."
    return (
        f"With {pairs} pairs at 95 %, about {pairs / 20:.1f} would differ by chance if all methods"
        " were equal. Choose the pair before looking, or go by the test of all pairs together."
        if pairs > 1
        else "There is one pair, so nothing was picked from among many."
    )


def summary(results: Results) -> str:
    """Say what the table shows, and what it does not."""
    scored = [m for m in results.methods if m.score is not None]
    if not scored:
        return "No final run has a score."
    best = scored[0]
    score = number(best.score.mean if best.score else None)
    if len(scored) == 1:
        return f"Only {best.label} has final scores: {score}{_bracketed(results, best)}."
    groups: dict[int, list[str]] = {0: [], 1: [], -1: []}
    for other in scored[1:]:
        found = results.find(best.label, other.label)
        better = 0 if found is None else found.better
        groups[better].append(f"{other.label}{_bracketed(results, other)}")
    parts = [f"Best mean: {best.label}, {score}{_bracketed(results, best)}."]
    for better, said in (
        (0, "Not told apart from it by these seeds"),
        (1, "Behind it, each pair taken alone"),
        (-1, "Ahead of it on the seeds that both have"),
    ):
        if groups[better]:
            parts.append(f"{said}: {', '.join(groups[better])}.")
    return " ".join(parts)


def of_seeds(results: Results, method: MethodResult) -> str:
    """Return "3 of 5 seeds", or nothing where all are there."""
    has, wanted = len(method.scores), len(results.config.final_seeds)
    return "" if has == wanted else f"{has} of {wanted} seeds"


def _bracketed(results: Results, method: MethodResult) -> str:
    seeds = of_seeds(results, method)
    return seeds and f" ({seeds})"


def edges(results: Results) -> list[str]:
    """Say which methods were best at the first or last of the rates tried, or that it was one."""
    if all(len(m.entry.learning_rates) == 1 for m in results.methods):
        return [
            "One learning rate was tried: any method's score may be short of what it can do, and"
            " their order is of this rate alone."
        ]
    said = []
    for end, side in (("lowest", "below"), ("highest", "above")):
        at_end = [m for m in results.methods if m.edge == end]
        if at_end:
            names = ", ".join(f"{m.label} ({m.rate:g})" for m in at_end)
            said.append(
                f"Best at the {end} rate tried: {names}. The optimum may lie {side} it, and the"
                " score may be short of what the method can do."
            )
    return said


def protocol(results: Results) -> list[str]:
    """Return how the comparison was made, a sentence or two each."""
    config, comparison = results.config, results.comparison
    rows = {k: v for r in results.records for k, v in r["rows"].items()}
    steps = next(iter(results.values("steps")), None)
    batch = next(iter(results.values("batch")), None)
    tuned = ", ".join(map(str, config.tuning_seeds))
    final = ", ".join(map(str, config.final_seeds))
    held = (
        f"the file {config.validation}"
        if isinstance(config.validation, str)
        else f"held out of the training file, the same for all (seed {config.validation_seed})"
    )
    seen = (
        "which no choice has seen"
        if config.data.overlap != "allow"
        else 'what rows that train or choose may ask too (`data.overlap` is "allow")'
    )
    untaken = [f"{label} {', '.join(names)}" for label, names in config.untaken().items()]
    return [
        f"Task {config.task}, score {comparison.metric} ({comparison.better} is better);"
        f" {count(rows.get('train'))} training rows, {count(rows.get('validation'))} validation"
        f" rows ({held}), {count(rows.get('test'))} test rows.",
        f"Every run of every method: the same rows, {count(steps)} steps of {count(batch)} rows,"
        " the same schedule and optimizer settings, and for one seed the same order of rows and"
        f" the same new head. {_checked(results)}",
        "Each method's learning rate is the one with the best mean over the tuning seeds"
        f" ({tuned}) on the validation rows; of equal means the lower rate. Intervals take that"
        " choice as given.",
        f"What is reported are other seeds ({final}) at that rate, on the test rows, {seen}.",
        "Intervals are Student's over seeds, 95 %. They say how another seed would do on these"
        " test rows, not how other rows would do.",
        "Differences are paired by seed. A difference whose interval holds zero, or of fewer than"
        " three seeds, is called a tie.",
        *([f"Common options that a method does not have: {'; '.join(untaken)}."] * bool(untaken)),
    ]


def _checked(results: Results) -> str:
    """Say what of the likeness of the runs was looked at."""
    if None in results.values("data_order"):
        return (
            "Runs whose steps or batch differ are refused; the order of rows was not recorded"
            " (loader processes or packing)."
        )
    return "Runs whose steps, batch or order differ are refused."


def memory_note(results: Results) -> str:
    """Say what the column of memory measures."""
    whats = [what for what in results.values("memory", "what") if what]
    devices = [device for device in results.values("memory", "device") if device]
    return (
        f"{'; '.join(whats)} ({', '.join(devices)}), the largest of the final seeds"
        if whats
        else ""
    )


def environment(results: Results) -> list[tuple[str, str]]:
    """Return versions and hardware; what differs between runs is listed, most frequent first."""
    threads = machines.listed([record["threads"] for record in results.records])
    return [
        *machines.rows([record["provenance"] for record in results.records]),
        ("Threads a run", threads or NONE),
    ]


def mixed(results: Results) -> str | None:
    """Say if the seconds and bytes come from unlike machines."""
    for path, what in (
        (("provenance", "hardware", "cpu"), "processors"),
        (("provenance", "hardware", "cores"), "numbers of cores"),
        (("provenance", "hardware", "gpus"), "GPUs"),
        (("threads",), "numbers of threads"),
    ):
        if len(results.values(*path)) > 1:
            return f"Seconds and memory come from different {what}; compare them with care."
    return None


def again(results: Results) -> str:
    """Return the command that makes the comparison again, given its file."""
    config: dict[str, Any] = results.config.to_dict()
    flags = [
        f"--{name} {name.upper()}"
        for name in ("model", "train_file", "validation", "test_file")
        if isinstance(config[name], str)
    ]
    return " ".join(["tlora compare compare.yaml", *flags])
