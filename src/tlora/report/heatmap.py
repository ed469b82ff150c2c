"""Ranks, scales, sensitivities and captured energies of a plan as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlora.files import replacing_file
from tlora.report.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tlora.adapter.plan import AdapterPlan

_CELL_WIDTH, _CELL_HEIGHT = 0.52, 0.24  # inches; a four-digit number fits at 6.5 points
_PANELS = (
    ("rank", "rank", "{:.0f}"),
    ("scale", "scale", "{:.2f}"),
    ("sensitivity / mean", "sensitivity", "{:.2g}"),
    ("captured energy", "captured_energy", "{:.2f}"),
)
"""Title, field of a module's plan, and format of the number in a cell."""


def save(plan: AdapterPlan, path: str | Path) -> Path:
    """Draw ``plan`` and write it to ``path`` as PNG, atomically; return the path."""
    path = Path(path)
    with replacing_file(path) as part:
        draw(plan).savefig(part, format="png", dpi=150)
    return path


def draw(plan: AdapterPlan) -> Figure:
    """Return a figure with a heat map of layers x projections for each thing that was measured."""
    from matplotlib.figure import Figure

    grid = Grid.of(plan.modules)
    tables = {title: (_table(grid, field), text) for title, field, text in _PANELS}
    tables = {title: each for title, each in tables.items() if not np.isnan(each[0]).all()}
    across = min(2, len(tables))
    down = -(-len(tables) // across)
    width = across * (len(grid.columns) * _CELL_WIDTH + 1.9)
    height = down * (len(grid.rows) * _CELL_HEIGHT + 1.4)
    figure = Figure(figsize=(width, height), layout="constrained")
    for place, (title, (table, text)) in enumerate(tables.items(), start=1):
        _draw_panel(figure.add_subplot(down, across, place, title=title), table, text, grid)
    return figure


def _table(grid: Grid, field: str) -> np.ndarray:
    """Return a field's values, rows x columns, NaN where there is none; sensitivities / mean."""
    table = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for (row, column), module in grid.cells.items():
        value = getattr(module, field)
        if value is not None:
            table[grid.rows.index(row), grid.columns.index(column)] = value
    if field == "sensitivity" and np.nansum(table) > 0:
        table /= np.nanmean(table)
    return table


def _draw_panel(axis: Axes, table: np.ndarray, text: str, grid: Grid) -> None:
    image = axis.imshow(table, aspect="auto", interpolation="nearest")
    axis.set_xticks(range(len(grid.columns)), grid.columns, rotation=35, ha="right", fontsize=7)
    axis.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(length=0)
    axis.figure.colorbar(image, ax=axis, pad=0.02)
    dark = table < np.nanmin(table) + 0.55 * np.ptp(table[~np.isnan(table)])
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            color = "white" if dark[row, column] else "black"
            said = text.format(value)
            axis.text(column, row, said, ha="center", va="center", fontsize=6.5, color=color)
