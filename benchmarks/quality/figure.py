"""The picture on README's first screen: the test score of each method, seed by seed.

    python benchmarks/quality/figure.py benchmarks/quality/base-ledger-seeds docs/ledger.png

reads the final runs of a comparison from its report.csv. A dot is a seed, a bar the mean.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The comparison's labels, and what the picture calls them, from the bottom up.
SHOWN = {
    "the paper's rule": "TLoRA, the paper's ranks and scales",
    "lora-fa": "LoRA-FA (random A, frozen)",
    "lora": "LoRA",
    "tlora, equal ranks and scales": "TLoRA, equal ranks and scales",
    "lora-ga": "LoRA-GA",
}
OURS = "tlora, equal ranks and scales"


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a comparison")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    scores, parameters = defaultdict(list), defaultdict(list)
    with (arguments.folder / "report.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["phase"] == "final" and row["method"] in SHOWN:
                scores[row["method"]].append(float(row["score"]))
                parameters[row["method"]].append(int(row["adapter_parameters"]))
    figure, axes = plt.subplots(figsize=(7.2, 2.9))
    for place, method in enumerate(SHOWN):
        color = "#c2410c" if method == OURS else "#475569"
        values = scores[method]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=5)
        mean = sum(values) / len(values)
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color=color, linewidth=3)
        axes.text(0.72, place, f"{mean:.2f}", va="center", ha="right", color=color)
    count = {method: round(sum(p) / len(p)) for method, p in parameters.items()}
    axes.set_yticks(
        range(len(SHOWN)),
        [f"{label}\n{count[method]:,} trained" for method, label in SHOWN.items()],
    )
    axes.set_xlim(0, 0.73)
    axes.set_xlabel("exact match on 500 test problems (dots: 15 seeds, bar: mean)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(arguments.picture, dpi=160)


if __name__ == "__main__":
    main()
