"""A comparison as one HTML file without external scripts, styles or fonts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from tlora.report import charts, firsttrytable, html, wording
from tlora.report.comparison import Results
from tlora.report.heatmap import heat_map
from tlora.report.intervals import Difference
from tlora.yamlfiles import to_yaml

if TYPE_CHECKING:
    from tlora.compare.compareconfig import CompareConfig

_OF_RAY = ("engine", "cpus_per_run", "gpus_per_run")
"""Fields that only apply to comparisons on Ray."""


def render(results: Results) -> str:
    """Return the page."""
    return html.render("comparison.html.j2", context(results))


def context(results: Results) -> dict[str, Any]:
    """Return the template's context of plain values and charts."""
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
        "first_try": firsttrytable.table(results) if config.first_try else None,
        "curves": charts.curves(results),
        "scatter": [charts.parameters(results, width) for width in (720, 336)],
        "edges": wording.edges(results),
        "maps": [
            heat_map(f"{m.label}: {what}", {n: module[what] for n, module in m.plan.items()}, form)
            for m in results.methods
            if m.plan
            for what, form in (("rank", "{}"), ("scale", "{:.2f}"))
        ],
        "data": pairs(results),
        "matrix": matrix(results),
        "caveat": wording.caveat(results),
        "protocol": wording.protocol(results),
        "environment": [
            *html.machines([record["provenance"] for record in results.records]),
            ("Threads a run", html.listed([record["threads"] for record in results.records])),
        ],
        "configuration": to_yaml(config, _unused(config)),
    }


def _unused(config: CompareConfig) -> tuple[str, ...]:
    """Return the fields omitted from the page because their defaults have no effect."""
    unset = (name for name in ("answers", "first_try") if not getattr(config, name))
    return (*(() if config.engine == "ray" else _OF_RAY), *unset)


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
