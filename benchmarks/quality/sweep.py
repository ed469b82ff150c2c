"""Compare methods on one task: every method x learning rate x seed, the same protocol for all.

    python benchmarks/quality/sweep.py benchmarks/quality/sst2.yaml \
        --model MODEL --train_file TRAIN --eval_file EVAL

A run that is finished is not run again, so the command can be stopped and given again; with
--shard 0/2 and --shard 1/2 two processes share the work. The results of all finished runs go to
``NAME.json`` beside the YAML file, and the table that the README quotes is printed.

What the table says: for each method the mean over seeds at the learning rate with the best mean,
chosen on the rows that are reported, alike for all methods; the spread is the smallest to the
largest seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tlora.files import read_json, write_json
from tlora.runconfig import RunConfig
from tlora.runfolder import RunFolder


@dataclass(frozen=True)
class Sweep:
    """What a YAML file of this folder says."""

    path: Path
    title: str
    metric: str
    better: str
    """ "higher" or "lower"."""
    run: dict[str, Any]
    """Fields of every run, as in a `tlora train` YAML file."""
    methods: dict[str, dict[str, Any]]
    """Options of each method."""
    learning_rates: list[float]
    seeds: list[int]

    @property
    def points(self) -> list[tuple[str, float, int]]:
        """Every (method, learning rate, seed), seeds outermost so that a part is a fair part."""
        return [
            (method, rate, seed)
            for seed in self.seeds
            for rate in self.learning_rates
            for method in self.methods
        ]

    def config(self, point: tuple[str, float, int], flags: argparse.Namespace) -> RunConfig:
        """The run of one point."""
        method, rate, seed = point
        fields = dict(self.run)
        fields["trainer"] = fields.get("trainer", {}) | {"learning_rate": rate}
        return RunConfig.from_dict(
            fields
            | {
                "model": flags.model,
                "train_file": flags.train_file,
                "eval_file": flags.eval_file,
                "method": method,
                "adapter": self.methods[method],
                "seed": seed,
                "resume": True,
                "output_dir": str(self.folder(point, flags)),
            }
        )

    def folder(self, point: tuple[str, float, int], flags: argparse.Namespace) -> Path:
        """Where that run is kept."""
        method, rate, seed = point
        return Path(flags.runs) / self.path.stem / f"{method}-{rate:g}-{seed}"


def main() -> None:
    """Run what is missing, collect, print."""
    flags = parse_flags()
    sweep = Sweep(path=flags.sweep, **yaml.safe_load(flags.sweep.read_text(encoding="utf-8")))
    if not flags.table:
        execute(sweep, flags)
        collect(sweep, flags)
    print(table(sweep, read_json(sweep.path.with_suffix(".json"))["runs"]))


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="YAML file of the sweep")
    parser.add_argument("--model")
    parser.add_argument("--train_file")
    parser.add_argument("--eval_file")
    parser.add_argument("--runs", default="runs/quality", help="where the runs are kept")
    parser.add_argument("--shard", default="0/1", help="i/n: run every n-th point, from the i-th")
    parser.add_argument("--table", action="store_true", help="print the committed results only")
    flags = parser.parse_args()
    if not flags.table and not (flags.model and flags.train_file and flags.eval_file):
        parser.error("--model, --train_file and --eval_file are needed to run")
    return flags


def execute(sweep: Sweep, flags: argparse.Namespace) -> None:
    """Run this shard's points that are not finished."""
    from tlora.stages import train

    shard, shards = map(int, flags.shard.split("/"))
    for number, point in enumerate(sweep.points):
        if number % shards == shard and not RunFolder(sweep.folder(point, flags)).finished:
            folder = train.run(sweep.config(point, flags))
            score = read_json(folder.metrics)[sweep.metric]
            print(f"{number + 1}/{len(sweep.points)}", *point, f"{sweep.metric} {score:.4f}")
            sys.stdout.flush()


def collect(sweep: Sweep, flags: argparse.Namespace) -> None:
    """Write the results of all finished runs, whoever ran them, to one JSON file."""
    runs, started = [], None
    for point in sweep.points:
        folder = RunFolder(sweep.folder(point, flags))
        if folder.finished:
            started = started or read_json(folder.path / "provenance.json")["starts"][0]
            method, rate, seed = point
            runs.append(
                {"method": method, "learning_rate": rate, "seed": seed}
                | folder.measured()
                | {"metrics": read_json(folder.metrics)}
            )
    setup = yaml.safe_load(sweep.path.read_text(encoding="utf-8"))
    result = {"sweep": setup, "provenance": started, "runs": runs}
    write_json(sweep.path.with_suffix(".json"), result)


def table(sweep: Sweep, runs: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: a row a method and learning rate, the best one marked."""
    lines = [
        f"**{sweep.title}** ({sweep.metric}, {sweep.better} is better)",
        "",
        "| method | trainable | learning rate | mean | least to greatest seed | init s | train s |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in sweep.methods:
        rows = [row for rate in sweep.learning_rates if (row := _row(sweep, runs, method, rate))]
        if not rows:
            continue
        pick = max if sweep.better == "higher" else min
        best = pick(rows, key=lambda row: row["mean"])
        for row in rows:
            mark = "**" if row is best else ""
            lines.append(
                f"| {method} | {row['trainable']:,} | {row['rate']:g} |"
                f" {mark}{row['mean']:.4f}{mark} | {row['low']:.4f} to {row['high']:.4f}"
                f" (n = {row['count']}) | {row['init']:.1f} | {row['train']:.1f} |"
            )
    return "\n".join(lines)


def _row(
    sweep: Sweep, runs: list[dict[str, Any]], method: str, rate: float
) -> dict[str, Any] | None:
    chosen = [r for r in runs if (r["method"], r["learning_rate"]) == (method, rate)]
    if not chosen:
        return None
    scores = [run["metrics"][sweep.metric] for run in chosen]
    return {
        "rate": rate,
        "mean": statistics.fmean(scores),
        "low": min(scores),
        "high": max(scores),
        "count": len(scores),
        "trainable": round(statistics.fmean(run["trainable_parameters"] for run in chosen)),
        "init": statistics.fmean(run["seconds"]["initialise"] for run in chosen),
        "train": statistics.fmean(run["seconds"]["train"] for run in chosen),
    }


if __name__ == "__main__":
    main()
