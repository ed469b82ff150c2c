"""How far the score after training depends on the calibration samples, beside the training seed.

    tlora demo --rows_only --output_dir rows
    python benchmarks/quality/robustness_scores.py --rows rows

adapts the embedded base to each of the demo's tasks, 60 steps of 16 rows at r = 4, with equal ranks
and scales, and to `ledger` by the paper's rule too, at the learning rates that base-ledger,
base-program and base-spelled chose (for twice the steps). It varies one thing at a time: the draw
of 32 calibration samples, the training seed (the order of the rows), the number of samples, and
whether they are of all three tasks. Every run is kept in robustness_scores.json beside this file
as it ends, and is not run again; `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from adapting import token_loss, train
from datasets import Dataset
from robustness import MIXTURE, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora import TLoraConfig, calibration_batches, get_tlora_model
from tlora.compare.exactmatch import exact_match
from tlora.demo.run import BASE_MODEL
from tlora.files import read_json, write_json
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.tokens import causal
from tlora.training.runfolder import provenance

RESULTS = Path(__file__).with_suffix(".json")
STEPS, BATCH, RANK = 60, 16, 4
TEST = 200  # rows of the score
EQUAL, PAPER = "equal ranks and scales", "the paper's rule"
RATES = {
    ("ledger", EQUAL): 0.017,
    ("program", EQUAL): 0.01,
    ("spelled", EQUAL): 0.03,
    ("ledger", PAPER): 0.0055,
}


class Run(NamedTuple):
    """One training: of which task, by which rule, calibrated on what."""

    task: str
    rule: str
    samples: int
    source: str
    """The task of the calibration samples, or the mixture."""
    draw: int
    seed: int

    @property
    def name(self) -> str:
        """Key of the results."""
        return "/".join(map(str, self))


def runs() -> list[Run]:
    """Return all runs, the ones that matter most first."""
    pairs = [(task, EQUAL) for task in ("ledger", "program", "spelled")] + [("ledger", PAPER)]
    made = []
    for number in range(5):
        made += [Run(*pair, 32, pair[0], number, 0) for pair in pairs]
        made += [Run(*pair, 32, pair[0], 0, number) for pair in pairs if number]
        made += [Run(*pair, 32, MIXTURE, number, 0) for pair in pairs if number < 3]
    made += [
        Run(*pair, count, pair[0], number, 0)
        for number in range(2)
        for count in (16, 512)
        for pair in pairs
    ]
    return made


def scored(run: Run, rows: dict[str, list[dict[str, str]]], test: list[dict[str, str]]) -> Any:
    """Calibrate, train, and return the test loss and exact match."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    first = run.draw * run.samples
    drawn = iter(rows[run.source][first : first + run.samples])
    allocate = run.rule == PAPER
    config = TLoraConfig(r=RANK, lora_alpha=RANK, allocate_rank=allocate, allocate_scale=allocate)
    made = calibration_batches(tokenizer, drawn, run.samples, batch_size=32, format="raw")
    adapted = get_tlora_model(model, config, made, progress=False)
    order = random.Random(f"order {run.seed}").sample(rows[run.task], STEPS * BATCH)
    steps = calibration_batches(tokenizer, iter(order), len(order), batch_size=BATCH, format="raw")
    train(adapted, steps, RATES[run.task, run.rule])
    test = test[:TEST]
    held_out = calibration_batches(tokenizer, iter(test), len(test), batch_size=100, format="raw")
    data = DataConfig(format="raw", max_length=512)
    encoded = Dataset.from_list([causal(tokenizer, row, data) for row in test])
    return {
        "loss": round(token_loss(adapted, held_out), 5),
        "exact_match": round(exact_match(adapted, tokenizer, encoded, 100), 4),
    }


def spreads(found: dict[str, dict[str, float]], measure: str) -> list[dict[str, Any]]:
    """Return mean and standard deviation of each group of runs, a record per task and rule."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for name, scores in found.items():
        task, rule, samples, source, draw, seed = name.split("/")
        place = groups.setdefault((task, rule), {})
        what = f"{source if source == MIXTURE else ''} {samples} samples".strip()
        if seed == "0":
            place.setdefault(what, []).append(scores[measure])
        if (what, draw) == ("32 samples", "0"):
            place.setdefault("training seeds", []).append(scores[measure])
    return [
        {"task": task, "rule": rule}
        | {
            what: {
                "mean": round(mean(values), 4),
                "sd": round(stdev(values), 4) if len(values) > 1 else None,
                "runs": len(values),
            }
            for what, values in place.items()
        }
        for (task, rule), place in groups.items()
    ]


def main() -> None:
    """Run what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    record = read_json(RESULTS) if RESULTS.is_file() else {}
    found = record.setdefault("runs", {})
    if not flags.table:
        torch.set_num_threads(1)
        flags.base = "embedded"
        rows = rows_of(flags)
        for run in runs():
            if run.name in found:
                continue
            test = (flags.rows / run.task / "test.jsonl").open(encoding="utf-8")
            found[run.name] = scored(run, rows, [json.loads(line) for line in test])
            record["provenance"] = provenance(None)
            write_json(RESULTS, record)
            print(run.name, found[run.name], flush=True)
    for measure in ("loss", "exact_match"):
        print(measure)
        for line in spreads(found, measure):
            print("  ", line)


if __name__ == "__main__":
    main()
