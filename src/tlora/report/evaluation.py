"""The report of an evaluation: page, Markdown and CSV, made from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tlora.files import replacing_file
from tlora.report import evalpage, evaltext, outcomes, samples


class Report(NamedTuple):
    """Where the report is, and its text."""

    page: Path
    markdown: Path
    table: Path
    text: str
    """What the Markdown file holds."""


def write(folder: str | Path) -> Report:
    """Write report.html, report.md and report.csv into ``folder``, each atomically.

    Neither a model nor the tasks' data are needed. Nothing is written where anything is wrong.

    Raises:
        ArtifactError: as `tlora.report.samples.read`.
    """
    results = outcomes.gather(samples.read(folder))
    text = evaltext.markdown(results)
    contents = (evalpage.render(results), text, evaltext.table(results))
    page, markdown, table = (Path(folder) / f"report.{kind}" for kind in ("html", "md", "csv"))
    for path, content in zip((page, markdown, table), contents, strict=True):
        with replacing_file(path) as part:
            part.write_text(content, encoding="utf-8")
    return Report(page, markdown, table, text)
