"""Ranks, scales, sensitivities and captured energies of a plan as one picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlora.files import replacing_file
from tlora.report.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tlora.adapter.plan import AdapterPlan, ModulePlan

_CELL_WIDTH, _CELL_HEIGHT = 0.52, 0.24  # inches; a four-digit number fits at 6.5 points


@dataclass(frozen=True)
class Panel:
    """One heat map of the picture."""

    title: str
    value: Callable[[ModulePlan], float | None]
    text: str
    """Format of the number in a cell."""
    log: bool = False
    """Colour by the logarithm: sensitivities span decades."""
    relative: bool = False
    """Divide by the mean over the modules, which is what ranks and scales are set by."""


PANELS = (
    Panel("rank", lambda module: module.rank, "{:.0f}"),
    Panel("scale", lambda module: module.scale, "{:.2f}"),
    Panel("sensitivity / mean", lambda module: module.sensitivity, "{:.2g}", True, relative=True),
    Panel("captured energy", lambda module: module.captured_energy, "{:.2f}"),
)


def save(plan: AdapterPlan, path: str | Path) -> Path:
    """Draw ``plan`` and write it to ``path`` as PNG, atomically; return the path."""
    path = Path(path)
    with replacing_file(path) as part:
        draw(plan).savefig(part, format="png", dpi=150)
    return path


def draw(plan: AdapterPlan) -> Figure:
    """Return a figure with a heat map of layers x projections for each thing that was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = Grid.of(plan.modules)
    tables = [(panel, _table(grid, panel)) for panel in PANELS]
    tables = [(panel, table) for panel, table in tables if not np.isnan(table).all()]
    across = min(2, len(tables))
    down = -(-len(tables) // across)
    width = len(grid.columns) * _CELL_WIDTH + 1.9
    height = len(grid.rows) * _CELL_HEIGHT + 1.4
    figure = Figure(figsize=(across * width, down * height), layout="constrained")
    FigureCanvasAgg(figure)  # a figure of its own, outside pyplot's global state
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (panel, table) in zip(axes, tables, strict=False):
        _draw_panel(axis, panel, table, grid)
    for axis in axes[len(tables) :]:
        axis.set_axis_off()
    return figure


def _table(grid: Grid, panel: Panel) -> np.ndarray:
    """Return the panel's values, rows x columns, NaN where there is no module or no value."""
    table = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for (row, column), module in grid.cells.items():
        value = panel.value(module)
        if value is not None:
            table[grid.rows.index(row), grid.columns.index(column)] = value
    if panel.relative and not np.isnan(table).all() and np.nanmean(table) > 0:
        table /= np.nanmean(table)
    return table


def _draw_panel(axis: Axes, panel: Panel, table: np.ndarray, grid: Grid) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    shown = np.where(table > 0, table, np.nan) if panel.log else table
    logarithmic = panel.log and not np.isnan(shown).all()
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    norm: Any = LogNorm(low, high) if logarithmic else Normalize(low, high)
    colours = colormaps["viridis"].with_extremes(bad="0.92")
    image = axis.imshow(shown, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axis.set_title(panel.title, fontsize=10)
    axis.set_xticks(range(len(grid.columns)), grid.columns, rotation=35, ha="right", fontsize=7)
    axis.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(length=0)
    axis.figure.colorbar(image, ax=axis, pad=0.02).ax.tick_params(which="both", labelsize=7)
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            # White on the dark half of the colours; what has no colour is on light grey.
            dark = not np.isnan(shown[row, column]) and norm(shown[row, column]) < 0.55
            colour = "white" if dark else "black"
            text = panel.text.format(value)
            axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
