"""A comparison as one HTML file that needs nothing else: no script, style or font from outside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tlora.files import replacing_file
from tlora.report import charts, html, wording
from tlora.report.comparison import Results
from tlora.report.grid import Grid
from tlora.report.statistics import Difference
from tlora.yamlfiles import to_yaml


def save(results: Results, path: str | Path) -> Path:
    """Write the page of ``results``, atomically; return its path."""
    path = Path(path)
    with replacing_file(path) as part:
        part.write_text(render(results), encoding="utf-8")
    return path


def render(results: Results) -> str:
    """Return the page."""
    return html.render("comparison.html.j2", context(results))


def context(results: Results) -> dict[str, Any]:
    """Return all that the template shows, as plain values and drawn charts."""
    config = results.config
    return {
        "title": config.title or f"{config.task}, {config.model}",
        "metric": results.comparison.metric,
        "better": results.comparison.better,
        "results": results,
        "methods": results.methods,
        "summary": wording.summary(results),
        "seeds": {m.label: wording.of_seeds(results, m) for m in results.methods},
        "figures": wording.FIGURES,
        "strips": charts.strips(results),
        "learning_rates": charts.learning_rates(results),
        "curves": charts.curves(results),
        "scatter": [charts.parameters(results, width) for width in (720, 336)],
        "edges": wording.edges(results),
        "maps": [*maps(results)],
        "data": pairs(results),
        "matrix": matrix(results),
        "caveat": wording.caveat(results),
        "protocol": wording.protocol(results),
        "memory_note": wording.memory_note(results),
        "environment": wording.environment(results),
        "configuration": to_yaml(config),
    }


def pairs(results: Results) -> str:
    """Return, as JSON for the page's selector, each pair's sentence and every seed's score."""
    scores = {m.label: m.scores for m in results.methods if m.scores}
    verdicts = {
        f"{first}\n{second}": wording.verdict(results, first, second)
        for first, second in itertools.permutations(scores, 2)
    }
    return html.embedded({"methods": [*scores], "scores": scores, "verdicts": verdicts})


def matrix(results: Results) -> list[tuple[str, list[Difference | None]]]:
    """Return rows of (label, differences): the row's method minus each column's."""
    labels = [m.label for m in results.methods if m.scores]
    return [
        (row, [None if row == column else results.find(row, column) for column in labels])
        for row in labels
    ]


def maps(results: Results) -> Iterator[dict[str, Any]]:
    """Yield ranks and scales of the methods that plan them, as layers x projections.

    "same" is the text of the rank or the scale that all modules have, if it is one; "shares" are of
    the largest, for colors.
    """
    for method in results.methods:
        if not method.plan:
            continue
        grid = Grid.of(method.plan)
        for what, form in (("rank", "{}"), ("scale", "{:.2f}")):
            values = {place: module[what] for place, module in grid.cells.items()}
            texts = {place: form.format(value) for place, value in values.items()}
            most = max(values.values()) or 1
            yield {
                "label": method.label,
                "what": what,
                "grid": grid,
                "texts": texts,
                "shares": {place: round(value / most, 3) for place, value in values.items()},
                "same": texts.popitem()[1] if len({*texts.values()}) == 1 else None,
            }
