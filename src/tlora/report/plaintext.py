"""A comparison as Markdown and as CSV, and all its files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tlora.errors import ConfigError, did_you_mean
from tlora.files import replacing_file
from tlora.report import firsttrytable, numbers, page, wording
from tlora.report import markdown as tables
from tlora.report.comparison import Record, Results

_COLUMNS: dict[str, Callable[[Results, Record], Any]] = {
    "method": lambda results, run: results.labels[run["name"]],
    "phase": lambda _, run: run["phase"],
    "learning_rate": lambda _, run: run["learning_rate"],
    "seed": lambda _, run: run["seed"],
    "score": lambda results, run: results.comparison.score(run),
    "adapter_parameters": lambda _, run: run["parameters"]["adapter"],
    "other_parameters": lambda _, run: run["parameters"]["others"],
    "memory_bytes": lambda _, run: run["memory"]["bytes"],
    "initialise_seconds": lambda _, run: run["seconds"]["initialise"],
    "train_seconds": lambda _, run: run["seconds"]["train"],
    "run": lambda _, run: run["name"],
}


def write(results: Results, folder: Path) -> tuple[Path, Path, Path]:
    """Write report.html, report.md and report.csv into ``folder``, each atomically."""
    paths = folder / "report.html", folder / "report.md", folder / "report.csv"
    for path, made in zip(paths, (page.render, markdown, table), strict=True):
        with replacing_file(path) as part:
            part.write_text(made(results), encoding="utf-8")
    return paths


def markdown(results: Results) -> str:
    """Return the headline table and its notes."""
    metric = results.comparison.metric
    head = ["method", f"{metric}, mean and 95 % interval", "seeds", *wording.FIGURES]
    rows = []
    for m in results.methods:
        cells = [m.label, numbers.NONE]
        if m.score is not None:
            cells = [m.label, f"{numbers.number(m.score.mean)} {numbers.margin(m.score)}"]
            cells.append(" ".join(map(numbers.number, m.scores.values())))
            cells += [text(m) for text in wording.FIGURES.values()]
        rows.append(cells + [""] * (len(head) - len(cells)))
    lines = [*_table(results, head, rows), wording.summary(results), wording.caveat(results), ""]
    lines += [f"- {sentence}" for sentence in wording.edges(results)]
    if results.config.first_try:
        lines += firsttrytable.markdown(results)
    lines += [f"- {sentence}" for sentence in wording.protocol(results)]
    lines += [f"- Missing: {p.run}: {p.cause}." for p in results.problems]
    return tables.document(lines)


def against(results: Results, label: str) -> str:
    """Return a table of each method's difference to one, paired by seed.

    Raises:
        ConfigError: no method has the label ``label``.
    """
    labels = [m.label for m in results.methods]
    if label not in labels:
        known = did_you_mean(label, labels) or f" There are: {'; '.join(labels)}."
        raise ConfigError(f"there is no method {label!r} here.{known}", where="against")
    metric = results.comparison.metric
    head = ["method", "adapter parameters", metric, f"{label} minus it, 95 %", f"{label} is"]
    rows = []
    for m in results.methods:
        score = numbers.NONE if m.score is None else numbers.number(m.score.mean)
        found = None if m.label == label else results.find(label, m.label)
        told = ["", ""]
        if found is not None:
            word = {1: "better", -1: "worse", 0: "tied"}[found.better]
            told = [
                f"{numbers.signed(found.interval.mean)} {numbers.margin(found.interval)}",
                f"{word}, of all pairs too" if results.holds(label, m.label) else word,
            ]
        rows.append([m.label, numbers.count(m.mean("parameters", "adapter")), score, *told])
    return tables.document([*_table(results, head, rows), wording.caveat(results)]).rstrip("\n")


def table(results: Results) -> str:
    """Return a CSV with one line per finished run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for run in results.records:
        writer.writerow([value(results, run) for value in _COLUMNS.values()])
    return text.getvalue()


def _table(results: Results, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a heading, a table and an empty line."""
    made = results.comparison
    title = results.config.title or results.config.task
    heading = f"**{title}** (test {made.metric}, {made.better} is better)"
    return [heading, "", *tables.table(head, rows), ""]
