"""A comparison as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tlora.errors import ConfigError, did_you_mean
from tlora.files import replacing_file
from tlora.report import numbers, wording
from tlora.report.comparison import Results

_COLUMNS = (
    "method",
    "phase",
    "learning_rate",
    "seed",
    "score",
    "adapter_parameters",
    "other_parameters",
    "memory_bytes",
    "initialise_seconds",
    "train_seconds",
    "run",
)


def save(results: Results, markdown_path: str | Path, csv_path: str | Path) -> None:
    """Write both files, each atomically."""
    for path, text in ((markdown_path, markdown(results)), (csv_path, table(results))):
        with replacing_file(path) as part:
            part.write_text(text, encoding="utf-8")


def markdown(results: Results) -> str:
    """Return the headline table and what belongs to it."""
    metric = results.comparison.metric
    lines = [
        *_heading(results),
        f"| method | {metric}, mean and 95 % interval | seeds | rate | adapter parameters | others"
        " | peak MiB | init s | train s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in results.methods:
        if m.score is None:
            lines.append(f"| {_cell(m.label)} | {numbers.NONE} | | | | | | | |")
            continue
        seeds = " ".join(map(numbers.number, m.scores.values()))
        lines.append(
            f"| {_cell(m.label)} | {numbers.number(m.score.mean)} {numbers.margin(m.score)} |"
            f" {seeds} | {m.rate:g} | {numbers.count(m.adapter_parameters)} |"
            f" {numbers.count(m.other_parameters)} | {numbers.mebibytes(m.memory)} |"
            f" {numbers.seconds(m.seconds('initialise'))} | {numbers.seconds(m.seconds('train'))} |"
        )
    lines += ["", wording.summary(results), wording.caveat(results), ""]
    lines += [f"- {sentence}" for sentence in wording.edges(results)]
    lines += [f"- {sentence}" for sentence in wording.protocol(results)]
    lines += [f"- Not there: {p.run}: {p.cause}." for p in results.problems]
    return "\n".join(lines) + "\n"


def against(results: Results, label: str) -> str:
    """Return a table of how each method differs from one, paired by seed.

    Raises:
        ConfigError: no method is called ``label``.
    """
    labels = [m.label for m in results.methods]
    if label not in labels:
        known = did_you_mean(label, labels) or f" There are: {'; '.join(labels)}."
        raise ConfigError(f"there is no method {label!r} here.{known}", where="against")
    metric = results.comparison.metric
    lines = [
        *_heading(results),
        f"| method | adapter parameters | {metric} | {_cell(label)} minus it, 95 % |"
        f" {_cell(label)} is |",
        "|---|---|---|---|---|",
    ]
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
        cells = [_cell(m.label), numbers.count(m.adapter_parameters), score, *told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", wording.caveat(results)])


def _cell(text: str) -> str:
    """Return a label as it may stand in a table: its bars do not divide cells."""
    return text.replace("|", "\\|")


def _heading(results: Results) -> list[str]:
    made = results.comparison
    title = results.config.title or results.config.task
    return [f"**{title}** (test {made.metric}, {made.better} is better)", ""]


def table(results: Results) -> str:
    """Return every finished run as a line of CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for record in results.records:
        rows = "test" if record["phase"] == "final" else "validation"
        writer.writerow(
            [
                results.labels[record["name"]],
                record["phase"],
                record["learning_rate"],
                record["seed"],
                results.comparison.score(record, rows),
                record["parameters"]["adapter"],
                record["parameters"]["others"],
                record["memory"]["bytes"],
                record["seconds"]["initialise"],
                record["seconds"]["train"],
                record["name"],
            ]
        )
    return text.getvalue()
