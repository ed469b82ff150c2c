"""Rows as long as the context: does it matter whether A is calibrated on long or on short rows?

    python benchmarks/quality/longcontext.py MODEL new_codealpaca.json

MODEL is tinystories-656k, whose context is 512 tokens. Programs with their instructions are joined
to one text and cut into rows of 512 tokens, to train and to test on. A is calibrated on 16 such
rows, on the same text cut into 128 rows of 64 tokens, or on 16 rows of 64 tokens, which is what
short samples cost; equal ranks and scales, r = 8. The results are three draws of calibration rows:
how the subspaces agree, and the test loss after 40 steps of 4 long rows. Every run is kept in
longcontext.json beside this file as it ends, and is not run again; `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from adapting import token_loss, train
from agreement import overlap
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora import TLoraConfig, attach, calibrate, plan
from tlora.adapter.plan import AdapterPlan
from tlora.files import read_json, write_json
from tlora.training.runfolder import provenance

RESULTS = Path(__file__).with_suffix(".json")
LONG, SHORT, ROWS, RANK = 512, 64, 16, 8
STEPS, BATCH, RATE, TEST = 40, 4, 0.1, 40
DRAWS = (0, 1, 2)
CUTS = {
    "16 rows of 512": (LONG, ROWS),
    "128 rows of 64": (SHORT, ROWS * LONG // SHORT),
    "16 rows of 64": (SHORT, ROWS),
}
"""Length and number of the calibration rows."""


def main() -> None:
    """Calibrate, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    record = read_json(RESULTS) if RESULTS.is_file() else {"runs": {}}
    if not flags.table:
        torch.set_num_threads(1)
        experiment(flags.model, flags.file, record)
    print(json.dumps(record["overlap"], indent=2))
    print("base", record["base"], json.dumps(losses(record["runs"]), indent=2))


def experiment(source: str, file: Path, record: dict[str, Any]) -> None:
    """Fill the record."""
    long = rows_of(file, AutoTokenizer.from_pretrained(source))
    test, training = long[:TEST], long[TEST:]
    config = TLoraConfig(
        r=RANK,
        lora_alpha=RANK,
        allocate_rank=False,
        allocate_scale=False,
    )
    plans = {
        (cut, draw): planned(source, cut_rows(training, *CUTS[cut], draw), config)
        for cut, draw in product(CUTS, DRAWS)
    }
    record["overlap"] = overlaps(plans)
    record["base"] = round(token_loss(loaded(source), batches(test, 8)), 5)
    for draw, cut in product(DRAWS, CUTS):
        name = f"{cut}/{draw}"
        if name in record["runs"]:
            continue
        model = attach(loaded(source), plans[cut, draw])
        chosen = random.Random(f"order {draw}").sample(range(len(training)), STEPS * BATCH)
        train(model, batches(training[chosen], BATCH), RATE)
        record["runs"][name] = round(token_loss(model, batches(test, 8)), 5)
        write_json(RESULTS, record)
        print(name, record["runs"][name], flush=True)
    write_json(RESULTS, record | {"provenance": provenance(None)})


def rows_of(file: Path, tokenizer: Any) -> Tensor:
    """Return the file's programs as rows of 512 tokens, in an order of their own."""
    found = json.loads(file.read_text(encoding="utf-8"))
    random.Random(0).shuffle(found)
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in found]
    ids = [token for some in tokenizer(texts)["input_ids"] for token in some]
    return torch.tensor(ids[: len(ids) // LONG * LONG]).view(-1, LONG)


def cut_rows(rows: Tensor, length: int, count: int, draw: int) -> Tensor:
    """Return ``count`` rows of ``length`` tokens; the draws share none.

    Args:
        rows: n x 512.
        length: a divisor of 512; pieces of one row follow each other.
        count: 16, or as many as 16 whole rows give.
        draw: its number.
    """
    own = rows[draw * ROWS : (draw + 1) * ROWS]
    pieces = own.view(len(own), -1, length)
    if count > len(own):
        return pieces.flatten(0, 1)
    # A piece of each row, the first of one, the second of the next.
    places = [row % pieces.shape[1] for row in range(count)]
    return pieces[torch.arange(count), torch.tensor(places)]


def batches(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Return the rows as batches in which every token is learned."""
    return [{"input_ids": some, "labels": some} for some in rows.split(size)]


def loaded(source: str) -> Any:
    """Return the base model."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def planned(source: str, rows: Tensor, config: TLoraConfig) -> AdapterPlan:
    """Return the plan of an adapter that is calibrated on the rows."""
    model = loaded(source)
    stats = calibrate(model, batches(rows, 8), config, progress=False)
    return plan(model, stats, config, progress=False)


def overlaps(plans: dict[tuple[str, int], AdapterPlan]) -> dict[str, float]:
    """Return the mean overlap of the subspaces over modules and pairs of draws, by pair of cuts."""
    found = {}
    for one, other in [*((cut, cut) for cut in CUTS), *combinations(CUTS, 2)]:
        each = [
            overlap(mine.lora_A, plans[other, j].modules[name].lora_A)
            for i, j in product(DRAWS, DRAWS)
            if i != j
            for name, mine in plans[one, i].modules.items()
        ]
        found[f"{one}, {other}"] = round(mean(each), 4)
    return found


def losses(runs: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of the test loss over draws, by cut."""
    by_cut = {cut: [runs[f"{cut}/{draw}"] for draw in DRAWS] for cut in CUTS}
    return {
        cut: {"mean": round(mean(values), 4), "sd": round(stdev(values), 4)}
        for cut, values in by_cut.items()
    }


if __name__ == "__main__":
    main()
