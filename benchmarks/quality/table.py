"""Print the results of a sweep from before `tlora compare`, as Markdown.

    python benchmarks/quality/table.py benchmarks/quality/demo.json

For each method and learning rate: the mean over seeds, and the least and the greatest. The rate was
chosen on the rows that are reported, alike for all methods, which `tlora compare` no longer does.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from tlora.files import read_json


def table(result: dict[str, Any]) -> str:
    """Return a row a method and learning rate, each method's best mean in bold."""
    sweep, runs = result["sweep"], result["runs"]
    lines = [
        f"**{sweep['title']}** ({sweep['metric']}, {sweep['better']} is better)",
        "",
        "| method | trainable | learning rate | mean | least to greatest seed | init s | train s |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in sweep["methods"]:
        rows = [
            _row(found, rate, sweep["metric"])
            for rate in sweep["learning_rates"]
            if (found := [r for r in runs if (r["method"], r["learning_rate"]) == (method, rate)])
        ]
        best = (max if sweep["better"] == "higher" else min)(row["mean"] for row in rows)
        for row in rows:
            mark = "**" if row["mean"] == best else ""
            lines.append(
                f"| {method} | {row['trainable']:,} | {row['rate']:g} |"
                f" {mark}{row['mean']:.4f}{mark} | {row['low']:.4f} to {row['high']:.4f}"
                f" (n = {row['count']}) | {row['init']:.1f} | {row['train']:.1f} |"
            )
    return "\n".join(lines)


def _row(runs: list[dict[str, Any]], rate: float, metric: str) -> dict[str, Any]:
    scores = [run["metrics"][metric] for run in runs]
    return {
        "rate": rate,
        "mean": statistics.fmean(scores),
        "low": min(scores),
        "high": max(scores),
        "count": len(scores),
        "trainable": round(statistics.fmean(run["trainable_parameters"] for run in runs)),
        "init": statistics.fmean(run["seconds"]["initialise"] for run in runs),
        "train": statistics.fmean(run["seconds"]["train"] for run in runs),
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(read_json(Path(name))))
