"""What the demonstration shows at its end: a table, an example, where things are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tlora import extras
from tlora.demo.run import DemoResult, Score

if TYPE_CHECKING:
    from rich.table import Table


def table(lines: Iterable[Score]) -> Table:
    """Return a line for the base model and for each method."""
    from tlora.report.tables import plain

    rows = [
        (
            line.method,
            f"{line.trainable:,}",
            f"{line.exact_match:.1%}",
            f"{line.initialise_seconds:.1f} s",
            f"{line.train_seconds:.1f} s",
        )
        for line in lines
    ]
    return plain(("method", "trainable parameters", "exact match", "initialize", "train"), rows)


def page(folder: Path) -> str:
    """Write the page of a run's plan beside its folder; return where it is."""
    if extras.missing("compare"):
        return 'no page; run `pip install "tlora[compare]"`'
    from tlora import AdapterPlan
    from tlora.report import heatmap
    from tlora.training.runfolder import RunFolder

    return str(
        heatmap.save(AdapterPlan.load(RunFolder(folder).plan), folder.with_name("plan.html"))
    )


def text(result: DemoResult) -> str:
    """Return what is said below the table."""
    return (
        f"exact match on {result.test_rows} problems that the adapters have not seen\n"
        f"prompt:  {result.example['prompt'].strip()}\n"
        f"base:    {result.example['base']}\n"
        f"adapted: {result.example['adapted']}\n"
        f"adapter: {result.adapter} (loaded by PEFT alone: logits differ by"
        f" {result.difference:.1g})\n"
        f"plan:    {page(result.adapter.parent)}\n"
        f"done in {result.seconds:.0f} s"
    )
