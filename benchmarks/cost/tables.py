"""Results as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from subjects import TITLES

GROWING = {"width": "width", "depth": "layers", "rank": "r", "samples": "samples"}


def page(points: Sequence[Any], result: dict[str, Any]) -> str:
    """Return one table a named point, then the exponents of the curves."""
    parts = [table(point, result) for point in points if point.axis is None]
    axes = list(dict.fromkeys(point.axis for point in points if point.axis is not None))
    if axes:
        parts.append(exponents(points, axes, result))
    return "\n\n".join(part for part in parts if part)


def runs_of(point: Any, subject: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was measured of a subject at a point."""
    keys = [key for key, name, _ in point.keys if name == subject]
    return [result["runs"][key] for key in keys if key in result["runs"]]


def median(runs: Sequence[dict[str, Any]], field: str) -> float:
    """Return the median of a field over repeats; NaN where one has failed or there is none."""
    values = [run.get(field, math.nan) for run in runs]
    return statistics.median(values) if values and not any(map(math.isnan, values)) else math.nan


def table(point: Any, result: dict[str, Any]) -> str:
    """Return the rows of one point: seconds, spread, and ratios to the bare passes and to (b)."""
    seconds = {s: median(runs_of(point, s, result), "seconds") for s in point.subjects}
    peaks = {s: median(runs_of(point, s, result), "peak_bytes") for s in point.subjects}
    if not any(runs_of(point, s, result) for s in point.subjects):
        return ""
    shape, setting = point.shape, point.setting
    lines = [
        f"**{point.name}**: hidden {shape.hidden}, intermediate {shape.intermediate},"
        f" {shape.layers} layers, vocabulary {shape.vocabulary}, {shape.dtype}; r = {setting.r},"
        f" {shape.samples} samples of {shape.tokens} tokens in batches of {setting.batch_size}",
        "",
        "| | seconds | least to most | / bare | / bare, one | / released |"
        " peak above the model, MiB | / released |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for subject in point.subjects:
        runs = runs_of(point, subject, result)
        if not runs:
            continue
        failed = next((run["failed"] for run in runs if "failed" in run), None)
        if failed:
            lines.append(f"| {TITLES[subject]} | {failed} | | | | | | |")
            continue
        each = [run["seconds"] for run in runs]
        cells = [
            TITLES[subject],
            f"{seconds[subject]:.2f}",
            f"{min(each):.2f} to {max(each):.2f} (n = {len(each)})",
            *(_ratio(seconds, subject, other) for other in ("bare", "bare-one", "released")),
            f"{peaks[subject] / 2**20:.0f}",
            _ratio(peaks, subject, "released"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(values: dict[str, float], subject: str, other: str) -> str:
    ratio = values[subject] / values.get(other, math.nan)
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


def exponents(points: Sequence[Any], axes: Sequence[str], result: dict[str, Any]) -> str:
    """Return the table of exponents: cost ~ size^p along each axis."""
    subjects = list(dict.fromkeys(s for p in points if p.axis for s in p.subjects))
    lines = [
        "| exponent of | " + " | ".join(f"{a}, time | {a}, memory" for a in axes) + " |",
        "|---|" + "---|---|" * len(axes),
    ]
    for subject in subjects:
        cells = []
        for axis in axes:
            for field in ("cpu_seconds", "peak_bytes"):
                fit = exponent(*curve(points, axis, subject, field, result))
                cells.append("" if math.isnan(fit) else f"{fit:.2f}")
        lines.append(f"| {TITLES[subject]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(
    points: Sequence[Any], axis: str, subject: str, field: str, result: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """Return sizes along an axis, and the median of a field at each."""
    sizes, values = [], []
    for point in points:
        if point.axis == axis and subject in point.subjects:
            value = median(runs_of(point, subject, result), field)
            if not math.isnan(value):
                sizes.append(float(point.name.split("=")[1]))
                values.append(value)
    return sizes, values


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return p of the least-squares fit log value = p log size + c; NaN with under two points."""
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope
