"""The picture of score against learning rate: the order at one low rate, and when each is tuned.

    python benchmarks/quality/ratecurves.py docs/rates.png

reads the committed tuning runs as firsttry.py does, and prints the two orders of each panel.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import firsttry
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from tlora.compare.comparefolder import CompareFolder
from tlora.compare.ratecurve import best_rate
from tlora.report.comparison import read as read_comparison

PANELS = {
    "base-ledger": ("embedded base (1.0M), ledger", 3e-3),
    "text30m-ledger": ("base of 30M, ledger", 3e-4),
    "text30m-gsm8k": ("base of 30M, text of GSM8K", 1e-3),
    "smollm2-equations": ("SmolLM2-135M, equations", 3e-4),
}
"""Table: its title, and the one low learning rate at which the order is read."""

FURTHER = {"smollm2-equations": "smollm2-one-rate"}
"""Table: a comparison with the same rows and steps that adds learning rates to its curves."""

COLORS = {
    "LoRA": "#1d4ed8",
    "PiSSA": "#7c3aed",
    "LoRA-GA": "#047857",
    "the paper's rule": "#c2410c",
    "TLoRA, equal": "#f59e0b",
}

_TICKS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def read() -> dict[str, firsttry.Task]:
    """Return the tables of `firsttry.read`, with the learning rates of `FURTHER`."""
    tasks = firsttry.read()
    for name, further in FURTHER.items():
        more = firsttry.curves(read_comparison(CompareFolder(firsttry.QUALITY / further)))
        curves = {
            label: dict(sorted({**curve, **more.get(label, {})}.items()))
            for label, curve in tasks[name].curves.items()
        }
        tasks[name] = dataclasses.replace(tasks[name], curves=curves)
    return tasks


def orders(task: firsttry.Task, rate: float, methods: list[str]) -> tuple[list, list]:
    """Return (method, score) from the best on, at ``rate`` and at each method's best rate.

    A method that was not tried at ``rate`` is missing from the first.
    """
    known = {label: task.curves[label] for label in methods if label in task.curves}
    fixed = {label: curve[rate] for label, curve in known.items() if curve.get(rate) is not None}
    tuned = {label: curve[best_rate(curve, task.better)] for label, curve in known.items()}
    first, second = (
        sorted(each.items(), key=lambda item: item[1], reverse=task.better == "higher")
        for each in (fixed, tuned)
    )
    return first, second


def main() -> None:
    """Draw the picture, print the orders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    tasks = read()
    figure, panels = plt.subplots(1, len(PANELS), figsize=(3.8 * len(PANELS), 3.9))
    for axes, (folder, (title, rate)) in zip(panels, PANELS.items(), strict=True):
        _draw(axes, tasks[folder], rate)
        axes.set_title(title, fontsize=10)
        for said, order in zip(
            ("at", "tuned"), orders(tasks[folder], rate, [*COLORS]), strict=True
        ):
            where = f"at {rate:g}" if said == "at" else said
            print(f"{folder}, {where}: " + ", ".join(f"{n} {s:.3f}" for n, s in order))
    panels[0].set_ylabel("validation loss per response token")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=5, frameon=False
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(arguments.picture, dpi=160)


def _draw(axes, task: firsttry.Task, rate: float) -> None:
    """Draw one curve a method, and a line at the low learning rate."""
    for label, color in COLORS.items():
        curve = {r: score for r, score in task.curves[label].items() if score is not None}
        axes.plot([*curve], [*curve.values()], "o-", color=color, label=label, markersize=4)
        tuned = best_rate(curve, task.better)
        axes.plot(tuned, curve[tuned], "o", color=color, markersize=9, fillstyle="none")
    tried = {r for label in COLORS for r in task.curves[label]}
    finish(axes, rate, [r for r in _TICKS if r in tried])


def finish(axes, rate: float, ticks: list[float]) -> None:
    """Mark the low learning rate, and set the axes of a plot of loss against learning rate."""
    axes.axvline(rate, color="#94a3b8", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    low, high = axes.get_ylim()
    if high > 2 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("learning rate")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
