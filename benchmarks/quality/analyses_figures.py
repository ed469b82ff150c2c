"""Draw docs/analysis-*.png from analyses.json beside this file.

python benchmarks/quality/analyses_figures.py
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from analyses import BINS, EVERY, RESULTS, STEPS, WIDEST

from tlora.files import read_json
from tlora.report.heatmap import Grid, split

ATTENTION = ("q_proj", "k_proj", "v_proj")
DOCS = Path(__file__).parents[2] / "docs"
COLORS = dict(
    zip(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        plt.get_cmap("tab10").colors,
        strict=False,
    )
)
OTHERS = "#a3a3a3"
RUN_COLORS = {
    "base": "#171717",
    "lora": "#1d4ed8",
    "lora, another seed": "#60a5fa",
    "tlora": "#c2410c",
    "tlora, the paper's rule": "#f59e0b",
    "trimatrix": "#15803d",
    "full, ledger": "#7c3aed",
}
LABELS = {
    "base": "base",
    "lora": "LoRA",
    "lora, another seed": "LoRA, another seed",
    "tlora": "TLoRA, recommended",
    "tlora, the paper's rule": "TLoRA, the paper's rule",
    "trimatrix": "Tri-Matrix",
    "full, ledger": "full fine-tuning",
}


def main() -> None:
    """Draw all."""
    record = read_json(RESULTS)
    for name, draw in {
        "weights": distributions,
        "norms": norms,
        "scales": scales,
        "eigenvalues": eigenvalues,
        "cosines": cosines,
        "query-value": query_value,
    }.items():
        figure = draw(record)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(DOCS / f"analysis-{name}.png", dpi=130)


def panels(count: int, width: float = 3.2, height: float = 3.0) -> tuple[plt.Figure, Any]:
    """Return a figure of ``count`` panels side by side."""
    size = (width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    return figure, axes[0]


def distributions(record: dict[str, Any]) -> plt.Figure:
    """Return histograms of entries over their standard deviation, and a Gaussian's density."""
    found = record["distributions"]
    figure, axes = panels(len(found), 2.4)
    middles = (np.arange(BINS) + 0.5) * 2 * WIDEST / BINS - WIDEST
    gaussian = np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi)
    for axis, (name, shape) in zip(axes, found.items(), strict=True):
        axis.bar(middles, shape["density"], 2 * WIDEST / BINS, color="#94a3b8")
        axis.plot(middles, gaussian, color="#c2410c", linewidth=1)
        axis.set_title(f"{name}\nexcess kurtosis {shape['excess']:.2g}", fontsize=9)
        axis.set_xlabel("standard deviations", fontsize=8)
        axis.set_ylim(0, 0.45)
    axes[0].set_ylabel("density")
    return figure


def norms(record: dict[str, Any]) -> plt.Figure:
    """Return the norms of trained parts by step, a line per module."""
    shown = {
        ("lora", "A"): "LoRA: A",
        ("lora", "B"): "LoRA: B",
        ("tlora", "B"): "TLoRA, recommended: B",
        ("tlora, the paper's rule", "B"): "TLoRA, the paper's rule: B",
        ("trimatrix", "B.core"): "Tri-Matrix: Q",
    }
    figure, axes = panels(len(shown), 2.7)
    for axis, ((run, part), title) in zip(axes, shown.items(), strict=True):
        seen: set[str] = set()
        for module, line in record["norms"][run][part].items():
            projection = module.rpartition(".")[2]
            label = None if projection in seen else projection
            seen.add(projection)
            steps = [EVERY * (place + 1) for place in range(len(line))]
            axis.plot(steps, line, color=COLORS[projection], label=label, linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0)
        axis.set_ylim(0)
        axis.set_xlabel("step")
    axes[0].set_ylabel("Frobenius norm")
    axes[-1].legend(fontsize=6, loc="lower right")
    return figure


def scales(record: dict[str, Any]) -> plt.Figure:
    """Return Tri-Matrix's learned scales: by step, and a map of them at the end."""
    by_step = {int(step): found for step, found in record["scales"]["by_step"].items()}
    figure, axes = panels(2, 4.2, 3.4)
    for projection, color in COLORS.items():
        axes[0].plot([], [], color=color, label=projection)
    for module in by_step[STEPS]:
        line = [(0, 1.0), *((step, found[module]) for step, found in by_step.items())]
        color = COLORS[module.rpartition(".")[2]]
        axes[0].plot(*zip(*line, strict=True), color=color, linewidth=1)
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("learned scale a")
    axes[0].set_ylim(0)
    axes[0].legend(fontsize=6, ncols=4, loc="lower center")
    grid = Grid.of(by_step[STEPS])
    values = [[grid.cells[row, column] for column in grid.columns] for row in grid.rows]
    furthest = max(abs(a - 1) for a in by_step[STEPS].values())
    image = axes[1].imshow(values, cmap="PuOr", vmin=1 - furthest, vmax=1 + furthest, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes[1].text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes[1].set_xticks(range(len(grid.columns)), grid.columns, rotation=45, fontsize=7)
    axes[1].set_yticks(range(len(grid.rows)), grid.rows)
    axes[1].set_ylabel("layer")
    axes[1].set_title("after training", fontsize=9)
    figure.colorbar(image, ax=axes[1])
    return figure


def eigenvalues(record: dict[str, Any]) -> plt.Figure:
    """Return the eigenvalues of W + D in layer 0, and of the updates D alone."""
    found = record["eigenvalues"]
    figure, axes = panels(2, 4.4, 3.6)
    for run, values in found["of_weights_in_layer_0"].items():
        if run in ("base", "lora", "trimatrix", "full, ledger"):
            axes[0].plot(values, color=RUN_COLORS[run], label=LABELS[run], linewidth=1.2)
    axes[0].set_title("W + D, query of layer 0", fontsize=9)
    axes[0].set_ylabel("real part of the eigenvalue")
    axes[0].set_xlabel("number, in ascending order")
    for run, layers in found["of_updates"].items():
        for layer, values in enumerate(layers):
            label = None if layer else LABELS[run]
            numbers = range(1, len(values) + 1)
            axes[1].plot(numbers, values, color=RUN_COLORS[run], label=label, linewidth=1)
    axes[1].set_title("D alone, queries of all layers", fontsize=9)
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_ylim(1e-3)
    axes[1].set_xlabel("number, in descending order")
    axes[1].set_ylabel("magnitude of the eigenvalue")
    for axis in axes:
        axis.legend(fontsize=7)
    return figure


def cosines(record: dict[str, Any]) -> plt.Figure:
    """Return the cosines with LoRA's, of adapted weights and of updates, a dot per module."""
    found = record["cosines"]
    weights = {"base": found["of_base_and_lora_weights"], **found["of_weights"]}
    figure, axes = panels(2, 4.6, 3.4)
    _dots(axes[0], weights)
    axes[0].set_title("W + D with LoRA's W + D", fontsize=9)
    _dots(axes[1], found["of_updates"])
    axes[1].set_title("D with LoRA's D", fontsize=9)
    axes[1].axvspan(-found["by_chance"], found["by_chance"], color="#e5e5e5", zorder=0)
    for axis in axes:
        axis.set_xlim(-0.1, 1.05)
        axis.set_xlabel("cosine")
    for name, color in (
        ("q_proj", COLORS["q_proj"]),
        ("v_proj", COLORS["v_proj"]),
        ("others", OTHERS),
    ):
        axes[1].plot([], [], "o", color=color, markersize=3, label=name)
    axes[1].legend(fontsize=7, loc="lower right")
    return figure


def _dots(axis: plt.Axes, rows: dict[str, dict[str, float]]) -> None:
    """Draw a row of dots per run, queries and values in front."""
    for place, values in enumerate(reversed(rows.values())):
        for name, value in values.items():
            projection = name.rpartition(".")[2]
            color = COLORS[projection] if projection in ("q_proj", "v_proj") else OTHERS
            shift = {"q_proj": 0.18, "v_proj": -0.18}.get(projection, 0)
            axis.plot(value, place + shift, "o", color=color, markersize=3)
    axis.set_yticks(range(len(rows)), [LABELS[run] for run in reversed(rows)], fontsize=8)


def query_value(record: dict[str, Any]) -> plt.Figure:
    """Return spectra of W^Q, W^K and W^V, how far each moves, how tasks differ, and where."""
    count = len(record["spectra"])
    figure, axes = panels(count + 3, 2.9, 3.2)
    for axis, (base, found) in zip(axes, record["spectra"].items(), strict=False):
        for name, spectrum in found.items():
            kind = name.rpartition(".")[2]
            shares = np.linspace(0, 1, len(spectrum["values"]))
            axis.plot(shares, spectrum["values"], color=COLORS[kind], linewidth=0.8, alpha=0.7)
        axis.set_title(f"spectra, {base}", fontsize=9)
        axis.set_xlabel("number over their count")
        axis.set_ylabel("singular value over the largest")
    move = record["movement"]
    for style, (task, found) in zip(("-", "--", ":"), move["tasks"].items(), strict=True):
        for kind in ATTENTION:
            label = task if kind == "q_proj" else None
            axes[count].plot(
                _by_layer(found["moved"], kind), style, color=COLORS[kind], label=label
            )
    axes[count].set_title("how far it moves, $||D|| / ||W||$", fontsize=9)
    axes[count].legend(fontsize=6)
    for kind in ATTENTION:
        line = _by_layer(move["between_tasks"], kind)
        axes[count + 1].plot(line, color=COLORS[kind], label=kind)
    axes[count + 1].set_title("cosine of two tasks' D, mean", fontsize=9)
    axes[count + 1].legend(fontsize=7)
    for axis in axes[count : count + 2]:
        axis.set_ylim(0)
        axis.set_xlabel("layer")
        axis.set_xticks(range(len(line)))
    _directions(axes[count + 2], move)
    return figure


def _by_layer(values: dict[str, float], projection: str) -> list[float]:
    chosen = {split(name)[1]: v for name, v in values.items() if name.endswith(projection)}
    return [chosen[layer] for layer in sorted(chosen)]


def _directions(axis: plt.Axes, move: dict[str, Any]) -> None:
    """Draw the share of the update's energy in principal and minor directions, over chance."""
    for shift, which in enumerate(("principal", "minor")):
        heights = [
            mean(
                found[which][name] / move["share_by_chance"][name]
                for found in move["tasks"].values()
                for name in found[which]
                if name.endswith(kind)
            )
            for kind in ATTENTION
        ]
        places = np.arange(len(ATTENTION)) + (shift - 0.5) * 0.38
        axis.bar(places, heights, 0.36, label=which, color=("#c2410c", "#475569")[shift])
    axis.axhline(1, color="#171717", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(ATTENTION)), ATTENTION)
    axis.set_title("share of $||D||^2$ over chance", fontsize=9)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    main()
