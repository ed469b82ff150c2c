"""Training curves as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tlora.files import replacing_file

Curve = Sequence[tuple[int, float]]


def read_log(path: str | Path, field: str = "loss") -> list[tuple[int, float]]:
    """Return (step, value) of every line of a run's log.jsonl that has ``field``."""
    lines = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return [(line["step"], float(line[field])) for line in lines if field in line]


def save(curves: Mapping[str, Curve], path: str | Path, ylabel: str = "training loss") -> Path:
    """Draw one line per name, the loss on a logarithmic axis; write a PNG, return its path.

    Args:
        curves: (step, loss) by name; at least one point each.
        path: the PNG.
        ylabel: what the values are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=name, linewidth=1.8)
    axis.set(xlabel="optimizer step", ylabel=ylabel, yscale="log")
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    with replacing_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
    return path
