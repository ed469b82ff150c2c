"""A comparison as one HTML file that needs nothing else: no script, style or font from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tlora.files import replacing_file
from tlora.parsing import to_yaml
from tlora.report import charts, html, numbers, wording
from tlora.report.comparison import MethodResult, Results
from tlora.report.grid import OUTSIDE, Grid


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
        "maps": [(m.label, rank_map(m)) for m in results.methods if m.plan],
        "data": pairs(results),
        "matrix": matrix(results),
        "caveat": wording.caveat(results),
        "protocol": wording.protocol(results),
        "memory_note": wording.memory_note(results),
        "mixed": wording.mixed(results),
        "environment": wording.environment(results),
        "command": wording.command(results),
        "configuration": to_yaml(config),
    }


def pairs(results: Results) -> str:
    """Return, as JSON for the page's selector, each pair's sentence and every seed's score."""
    scored = [m for m in results.methods if m.scores]
    found = {
        "methods": [m.label for m in scored],
        "scores": {m.label: m.scores for m in scored},
        "verdicts": {
            f"{a.label}\n{b.label}": wording.verdict(results, a.label, b.label)
            for a in scored
            for b in scored
            if a is not b
        },
    }
    return html.embedded(found)


def matrix(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return rows of (label, cells): row minus column, with "win", "loss", "tie" or "" by it."""
    scored = [m.label for m in results.methods if m.scores]
    kinds = {1: "win", -1: "loss", 0: "tie"}
    rows = []
    for first in scored:
        cells = []
        for second in scored:
            found = results.find(first, second) if first != second else None
            cells.append(
                ("", "")
                if found is None
                else (numbers.signed(found.interval.mean), kinds[found.better])
            )
        rows.append((first, cells))
    return rows


def rank_map(method: MethodResult) -> dict[str, Any]:
    """Return ranks and scales of a plan laid out as layers x projections, shares for colours.

    "same" has the rank or the scale that all modules have, if it is one.
    """
    plan: dict[str, dict[str, Any]] = dict(method.plan or {})
    grid = Grid.of(plan)
    most = {what: max(m[what] for m in plan.values()) or 1 for what in ("rank", "scale")}
    rows = []
    for row in grid.rows:
        cells = []
        for column in grid.columns:
            module = grid.cells.get((row, column))
            cells.append(
                module
                and {
                    "rank": module["rank"],
                    "scale": f"{module['scale']:.2f}",
                    "rank_share": round(module["rank"] / most["rank"], 3),
                    "scale_share": round(module["scale"] / most["scale"], 3),
                }
            )
        rows.append(("" if row == OUTSIDE else row, cells))
    shown = [cell for _, cells in rows for cell in cells if cell]
    values = {what: {cell[what] for cell in shown} for what in most}
    same = {what: found.pop() for what, found in values.items() if len(found) == 1}
    return {"columns": grid.columns, "rows": rows, "same": same}
