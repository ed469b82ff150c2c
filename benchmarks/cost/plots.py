"""Results as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator
from subjects import TITLES
from tables import curve, exponent, median, runs_of

COLORS = {"tlora": "#0b6e4f", "bare": "#7a7a7a", "released": "#b3261e", "peft": "#8fa8c8"}
AXES = {
    "width": "hidden size",
    "depth": "layers",
    "rank": "rank r",
    "samples": "samples",
}


def draw(points: Sequence[Any], result: dict[str, Any], path: Path) -> list[Path]:
    """Write NAME-POINT.png for each named point and NAME-growth.png for the curves."""
    written = [bars(p, result, path) for p in points if p.axis is None and _any(p, result)]
    if any(p.axis and _any(p, result) for p in points):
        written.append(growth(points, result, path))
    return written


def _any(point: Any, result: dict[str, Any]) -> bool:
    runs = [run for subject in point.subjects for run in runs_of(point, subject, result)]
    return any("seconds" in run for run in runs)


def _color(subject: str) -> str:
    return COLORS.get(subject.split("-", maxsplit=1)[0], COLORS["peft"])


def bars(point: Any, result: dict[str, Any], path: Path) -> Path:
    """Draw time and peak memory of every subject at a point, the spread as a line."""
    known = []
    for subject in point.subjects:
        runs = runs_of(point, subject, result)
        if runs and not math.isnan(median(runs, "seconds")):
            known.append((subject, runs))
    known.reverse()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.36 * len(known) + 1.4), sharey=True)
    places = range(len(known))
    colors = [_color(subject) for subject, _ in known]
    for axes, field, unit in ((left, "seconds", 1.0), (right, "peak_bytes", 2.0**20)):
        middle, low, high = _spread(known, field, unit)
        axes.barh(places, middle, color=colors, xerr=[low, high], ecolor="#222222")
        top = max(m + h for m, h in zip(middle, high, strict=True))
        axes.set_xlim(0, 1.18 * top)
        for place, value, above in zip(places, middle, high, strict=True):
            text = f"{value:.2f}" if unit == 1.0 else f"{value:.0f}"
            axes.text(value + above + 0.015 * top, place, text, va="center", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, [TITLES[subject] for subject, _ in known], fontsize=8)
    left.set_xlabel("seconds (median; line: least to most)")
    right.set_xlabel("peak memory above the loaded model, MiB")
    figure.suptitle(f"Initializing an adapter: {point.name}", fontsize=10)
    return _saved(figure, path.with_name(f"{path.stem}-{_slug(point.name)}.png"))


def _spread(known: Any, field: str, unit: float) -> tuple[list[float], list[float], list[float]]:
    """Return medians, and how far the least and the most lie below and above them."""
    each = [[run[field] / unit for run in runs] for _, runs in known]
    middle = [median(runs, field) / unit for _, runs in known]
    low = [m - min(values) for m, values in zip(middle, each, strict=True)]
    high = [max(values) - m for m, values in zip(middle, each, strict=True)]
    return middle, low, high


def growth(points: Sequence[Any], result: dict[str, Any], path: Path) -> Path:
    """Draw time and memory along every axis, with the fitted exponents in the legends."""
    axes_names = list(dict.fromkeys(p.axis for p in points if p.axis))
    figure, grid = plt.subplots(
        2, len(axes_names), figsize=(3.6 * len(axes_names), 6.4), squeeze=False
    )
    for column, axis in enumerate(axes_names):
        subjects = list(dict.fromkeys(s for p in points if p.axis == axis for s in p.subjects))
        for row, (field, unit) in enumerate((("cpu_seconds", 1.0), ("peak_bytes", 2.0**20))):
            axes = grid[row][column]
            for subject in subjects:
                sizes, values = curve(points, axis, subject, field, result)
                if not sizes:
                    continue
                label = f"{TITLES[subject].split(',')[0]} ^{exponent(sizes, values):.2f}"
                axes.plot(
                    sizes,
                    [value / unit for value in values],
                    marker="o",
                    linestyle="--" if subject.endswith(("blocks", "streamed")) else "-",
                    color=_color(subject),
                    label=label,
                )
                axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(which="both", labelsize=7)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6)
            axes.set_xlabel(AXES[axis])
    grid[0][0].set_ylabel("seconds of CPU")
    grid[1][0].set_ylabel("peak above the model, MiB")
    figure.suptitle("How the cost of initializing grows (exponents fitted)", fontsize=10)
    return _saved(figure, path.with_name(f"{path.stem}.png"))


STAGE_COLORS = {
    "passes": "#7a7a7a",
    "moments": "#0b6e4f",
    "sensitivities": "#3d9970",
    "W C": "#8fa8c8",
    "factorizations": "#4a6fa5",
    "attach": "#d9a441",
}


def stages(result: dict[str, Any], path: Path) -> Path:
    """Draw a bar for each run, one part for each stage."""
    runs = dict(reversed(result["runs"].items()))
    figure, axes = plt.subplots(figsize=(10, 0.6 * len(runs) + 1.6))
    for place, run in enumerate(runs.values()):
        left = 0.0
        for stage, color in STAGE_COLORS.items():
            share = run["seconds"][stage] / run["total"]
            axes.barh(place, share, left=left, color=color, label=stage if not place else None)
            if share > 0.04:
                text = f"{run['seconds'][stage]:.2f} s"
                dark = stage not in ("W C", "attach")
                style = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(left + share / 2, place, text, color="w" if dark else "k", **style)
            left += share
    names = [f"{key}\n{run['total']:.2f} s" for key, run in runs.items()]
    axes.set_yticks(range(len(runs)), names, fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the time, timers included")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncol=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _saved(figure, path)


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").lower()


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
