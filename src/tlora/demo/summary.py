"""Final output of the demonstration: a table, a plot, an example, and paths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tlora import extras
from tlora.demo.run import DemoResult, Score

if TYPE_CHECKING:
    from rich.table import Table


def table(lines: Iterable[Score]) -> Table:
    """Return one line for the base model and each method."""
    from tlora.report.tables import plain

    rows = [
        (line.method, f"{line.trainable:,}", f"{line.mean:.1%}", _seeds(line)) for line in lines
    ]
    return plain(("method", "trainable parameters", "exact match", "each seed"), rows)


def _seeds(line: Score) -> str:
    """Return the scores of a method by seed; nothing for the base model's single score."""
    return " ".join(f"{value:.1%}" for value in line.exact_match if len(line.exact_match) > 1)


def page(result: DemoResult) -> str:
    """Write the page of scores and losses into the demo's folder, and return its path."""
    if extras.missing("compare"):
        return f"no page; run {extras.install('compare')}"
    from tlora.report import charts, svg
    from tlora.report.heatmap import write_page

    rows = {f"{s.method}, {s.trainable:,} trained": s.exact_match for s in result.scores}
    said = ", ".join(f"{line.method} {line.mean:.1%}" for line in result.scores)
    drawn = {
        "exact match": (
            f"On {result.test_rows} problems that no adapter has seen: each seed a dot, a line"
            " at the mean.",
            {"": svg.seeds(rows, 560, f"Exact match: {said}")},
        ),
        "training loss": (
            "The mean over seeds, on a logarithmic axis; gray lines are the other methods.",
            charts.losses({line.method: line.loss for line in result.scores}),
        ),
    }
    file = result.adapter.parents[1] / "demo.html"
    return str(write_page(file, "Demo", f"Mean exact match: {said}", [], drawn))


def text(result: DemoResult) -> str:
    """Return the text below the table."""
    return (
        f"exact match on {result.test_rows} problems that the adapters have not seen, the mean and"
        " each seed\n"
        f"prompt:  {result.example['prompt'].strip()}\n"
        f"base:    {result.example['base']}\n"
        f"adapted: {result.example['adapted']}\n"
        f"adapter: {result.adapter} (loaded by PEFT alone: logits differ by"
        f" {result.difference:.1g})\n"
        f"plot:    {page(result)}\n"
        f"done in {result.seconds:.0f} s"
    )
