"""Draw docs/sensitivity.png and docs/robustness.png from the results beside this file.

    python benchmarks/quality/robustness_figures.py

The first has a map of sensitivities per task, S_i over its mean, which is what the paper's rule
multiplies r by. The second has the agreement between draws of calibration samples, beside that
between tasks, and the spread of test losses over draws, beside that over training seeds.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from robustness import MIXTURE
from robustness import RESULTS as AGREEMENT
from robustness_scores import RESULTS as SCORES
from robustness_scores import spreads

from tlora.files import read_json
from tlora.report.heatmap import Grid

DOCS = Path(__file__).parents[2] / "docs"
BASES = {"embedded": "embedded base", "smollm2": "SmolLM2-135M-Instruct"}
TASKS = ("ledger", "program", "spelled", "equations", "gsm8k", "code", "alpaca")
COLORS = dict(zip(TASKS, plt.get_cmap("tab10").colors, strict=False))


def main() -> None:
    """Draw both."""
    record = read_json(AGREEMENT)
    maps(record).savefig(DOCS / "sensitivity.png", dpi=160)
    runs = read_json(SCORES)["runs"] if SCORES.is_file() else {}
    robustness(record, runs).savefig(DOCS / "robustness.png", dpi=160)


def relative(sensitivity: dict[str, float]) -> dict[str, float]:
    """Return S_i over its mean."""
    average = mean(sensitivity.values())
    return {name: value / average for name, value in sensitivity.items()}


def maps(record: dict[str, Any]) -> plt.Figure:
    """Return a heat map of layers x projections per base and task, side by side, in one scale."""
    shown = [(base, t) for base in record for t in TASKS if t in record[base]["sensitivity"]]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2 * len(shown) + 1, 4.2), squeeze=False, layout="constrained"
    )
    norm = LogNorm(0.1, 10)
    for axis, (base, task) in zip(axes[0], shown, strict=True):
        grid = Grid.of(relative(record[base]["sensitivity"][task]))
        values = [[grid.cells.get((r, c), np.nan) for c in grid.columns] for r in grid.rows]
        image = axis.imshow(values, norm=norm, cmap="viridis", aspect="auto")
        axis.set_title(f"{BASES[base]}\n{task}", fontsize=8)
        axis.set_xticks(range(len(grid.columns)), grid.columns, rotation=90, fontsize=7)
        step = 1 if len(grid.rows) < 10 else 5
        axis.set_yticks(range(0, len(grid.rows), step), grid.rows[::step], fontsize=7)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="S over its mean", ticks=[0.1, 0.3, 1, 3, 10])
    figure.axes[-1].set_yticklabels(["0.1", "0.3", "1", "3", "10"])
    return figure


def robustness(record: dict[str, Any], runs: dict[str, Any]) -> plt.Figure:
    """Return the agreement by number of samples for each base, and the spread of test losses."""
    record = {base: found for base, found in record.items() if _repeated(found)}
    count = len(record) + bool(runs)
    figure, axes = plt.subplots(
        1, count, figsize=(4.1 * count, 3.6), squeeze=False, layout="constrained"
    )
    for axis, (base, found) in zip(axes[0], record.items(), strict=False):
        _agreement(axis, found)
        axis.set_title(BASES[base], fontsize=10)
    if runs:
        _spread(axes[0][-1], spreads(runs, "loss"))
    return figure


def _repeated(found: dict[str, Any]) -> bool:
    """Return whether a base has draws and tasks to compare."""
    draws = [each for by_count in found["between_draws"].values() for each in by_count.values()]
    return any(draws) and bool(found["between_tasks"]["pairs"])


def _agreement(axis: plt.Axes, found: dict[str, Any]) -> None:
    """Draw the overlap of subspaces between draws, by samples; lines: between tasks, by chance."""
    for task, by_count in found["between_draws"].items():
        line = [(int(n), each["overlap"]) for n, each in by_count.items() if each]
        if line and task != MIXTURE:
            axis.plot(*zip(*line, strict=True), "o-", color=COLORS[task], label=task)
    pairs = found["between_tasks"]["pairs"]
    others = [each["overlap"] for name, each in pairs.items() if MIXTURE not in name]
    axis.axhspan(min(others), max(others), color="#d4d4d4", label="between two tasks")
    axis.axhline(found["overlap_by_chance"], color="#525252", linestyle=":", label="by chance")
    axis.set_xscale("log", base=2)
    axis.set_xticks([16, 32, 128, 512], ["16", "32", "128", "512"])
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("calibration samples")
    axis.set_ylabel(r"overlap of subspaces, $\|A_1 A_2^T\|_F^2 / r$")
    axis.legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.62))
    axis.spines[["top", "right"]].set_visible(False)


def _spread(axis: plt.Axes, lines: list[dict[str, Any]]) -> None:
    """Draw the standard deviation of the test loss over draws and over training seeds."""
    shown = [line for line in lines if line.get("training seeds", {}).get("sd")]
    for shift, (what, label) in enumerate(
        (("32 samples", "draws of 32 samples"), ("training seeds", "training seeds"))
    ):
        heights = [line[what]["sd"] for line in shown]
        places = np.arange(len(shown)) + (shift - 0.5) * 0.38
        axis.bar(places, heights, 0.36, label=label, color=("#c2410c", "#475569")[shift])
    rules = {"equal ranks and scales": "equal", "the paper's rule": "the paper's"}
    names = [f"{line['task']},\n{rules[line['rule']]}" for line in shown]
    axis.set_xticks(range(len(shown)), names, fontsize=8)
    axis.set_ylabel("standard deviation of the test loss")
    axis.set_title("embedded base, after training", fontsize=10)
    axis.margins(y=0.3)
    axis.legend(fontsize=8, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
