"""The paper's protocol at a small scale: the order at one low learning rate, and tuned.

    python benchmarks/quality/protocol.py docs/protocol.png

reads base-protocol, prints its table, and draws loss against learning rate beside the order at the
low rate against the paper's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ratecurves import finish
from scipy import stats

from tlora.compare.comparefolder import CompareFolder
from tlora.report.comparison import MethodResult, Results, read

FOLDER = CompareFolder(Path(__file__).parent / "base-protocol")
LOW_RATE = 3e-4

PAPER = {
    "init + RA + SA, A trained": 57.01,
    "init + RA + SA": 56.34,
    "init + SA": 55.11,
    "init + RA": 54.05,
    "pissa": 53.44,
    "init": 51.78,
    "RA + SA": 47.68,
    "SA": 45.86,
    "RA": 45.33,
    "lora": 44.80,
}
"""Accuracy on GSM8K, Llama-2-7B (arXiv 2604.18124, the main table and the ablation)."""

NAMES = {
    "lora": "LoRA",
    "pissa": "PiSSA",
    "none": "none (LoRA-FA)",
    "init + RA + SA": "init + RA + SA (the paper)",
}
_RANDOM, _INIT, _TRAINED = "#94a3b8", "#c2410c", "#1d4ed8"
_MARKS = {"": "o", "RA": "^", "SA": "s", "RA + SA": "D"}


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture
    results = read(FOLDER)
    print(table(results))
    figure, (curves, orders) = plt.subplots(
        1, 2, figsize=(11.5, 5), gridspec_kw={"width_ratios": [3, 2]}
    )
    _draw_curves(curves, results)
    _draw_orders(orders, results)
    figure.legend(
        *curves.get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(picture, dpi=160)


def table(results: Results) -> str:
    """Return a line per method, from the best at the low rate on."""
    lora = next(method for method in results.methods if method.label == "lora")
    lines = [
        f"| | trained parameters | paper, GSM8K | at {LOW_RATE:g} | at its best | best rate |"
        " test loss | minus LoRA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in sorted(results.methods, key=lambda method: method.tuning_means[LOW_RATE]):
        score, rate = method.score, method.learning_rate
        pair = None if method is lora else results.find(method.label, "lora")
        cells = [
            NAMES.get(method.label, method.label),
            f"{method.parameters:,}",
            f"{PAPER[method.label]:.2f}" if method.label in PAPER else "",
            f"{method.tuning_means[LOW_RATE]:.3f}",
            f"{method.tuning_means[rate]:.3f}",
            f"{rate:g}",
            f"{score.mean:.3f} ± {score.half:.3f}",
            f"{pair.interval.mean:+.3f} ± {pair.interval.half:.3f}" if pair else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    low, best = (correlation(results, tuned) for tuned in (False, True))
    said = (
        f"rank correlation with the paper: {low:.2f} at {LOW_RATE:g}, {best:.2f} at the best rates"
    )
    return "\n".join([*lines, "", said])


def correlation(results: Results, tuned: bool) -> float:
    """Return Spearman's correlation of the paper's accuracy with our validation loss, negated.

    Args:
        results: the comparison.
        tuned: take each method's best learning rate, not the low one.
    """
    known = [method for method in results.methods if method.label in PAPER]
    rates = [method.learning_rate if tuned else LOW_RATE for method in known]
    ours = [-method.tuning_means[rate] for method, rate in zip(known, rates, strict=True)]
    return float(stats.spearmanr([PAPER[method.label] for method in known], ours).statistic)


def _style(method: MethodResult) -> tuple[str, str]:
    """Return color (of the start, and whether A trains) and marker (of ranks and scales)."""
    label = method.label
    if label in ("lora", "pissa") or label.endswith("A trained"):
        return _TRAINED, {"lora": "o", "pissa": "s"}.get(label, "^" if label < "init," else "D")
    parts = [part for part in ("RA", "SA") if part in label]
    return _INIT if "init" in label else _RANDOM, _MARKS[" + ".join(parts)]


def _draw_curves(axes, results: Results) -> None:
    """Draw one curve a method, and a line at the low learning rate."""
    for method in results.methods:
        color, mark = _style(method)
        label = NAMES.get(method.label, method.label)
        axes.plot(
            [*method.tuning_means], [*method.tuning_means.values()], color=color, marker=mark,
            linewidth=1.2, markersize=4.5, label=label,
        )  # fmt: skip
    finish(axes, LOW_RATE, [*results.methods[0].tuning_means])
    axes.set_ylabel("validation loss per response token")


def _draw_orders(axes, results: Results) -> None:
    """Draw the paper's accuracy against the loss at the low rate."""
    for method in results.methods:
        if method.label in PAPER:
            color, mark = _style(method)
            place = method.tuning_means[LOW_RATE], PAPER[method.label]
            axes.plot(*place, color=color, marker=mark)
            axes.annotate(
                NAMES.get(method.label, method.label), place, xytext=(6, 3),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes.invert_xaxis()
    axes.margins(x=0.3)
    axes.set_xlabel(f"our validation loss at {LOW_RATE:g} for all (lower is better)")
    axes.set_ylabel("paper: GSM8K, Llama-2-7B, 2e-5 for all")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
