"""How far ranks and subspaces depend on the calibration samples, and differ by task.

    tlora demo --rows_only --output_dir rows
    python benchmarks/quality/robustness.py measure embedded --work WORK --rows rows
    python benchmarks/quality/robustness.py measure smollm2 --work WORK --data DATA \
        --equations rows/equations/train.jsonl --model SMOLLM2
    python benchmarks/quality/robustness.py agree --work WORK

`measure` calibrates a base on each task, and on a mixture of its tasks, on three draws of samples
that share none, and keeps S and the leading r right singular vectors of W C after 16, 32, 128 and
512 of a draw's samples. It resumes. `agree` compares what WORK holds and writes robustness.json
beside this file, which robustness_figures.py draws. DATA holds gsm8k/train.jsonl,
code/new_codealpaca.json and chat/alpaca_en_demo.json; SMOLLM2 is SmolLM2-135M-Instruct. Of these
only rows of at most 450 characters count, which keeps a sample at about 100 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from agreement import Measured, by_chance, concentration, mean_agreement, pooled
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora import Calibration, TLoraConfig, calibrate, calibration_batches, plan
from tlora.demo.run import BASE_MODEL
from tlora.files import read_json, read_tensors, write_json, write_tensors
from tlora.training.runfolder import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "robustness.json"
COUNTS = (16, 32, 128, 512)
CHUNK = 32
LONGEST = 450  # characters of a row of the real data sets
MIXTURE = "mixture"
Row = dict[str, str]


@dataclass(frozen=True)
class Study:
    """A base, its rank, and how many samples each draw of its tasks has."""

    rank: int
    draws: dict[str, tuple[int, ...]]
    """Samples of each draw, by task."""
    form: dict[str, Any]
    """Fields of `calibration_batches`."""


STUDIES = {
    "embedded": Study(
        4,
        dict.fromkeys(("ledger", "program", "spelled", MIXTURE), (512, 512, 512)),
        {"format": "raw"},
    ),
    "smollm2": Study(
        16,
        {"equations": (512, 128, 128)}
        | dict.fromkeys(("gsm8k", "code", "alpaca", MIXTURE), (128, 32, 32)),
        {"format": "chat"},
    ),
}


def main() -> None:
    """Measure or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["measure", "agree"])
    parser.add_argument("base", nargs="?", choices=list(STUDIES))
    for name in ("work", "rows", "data", "equations", "model"):
        parser.add_argument(f"--{name}", type=Path)
    flags = parser.parse_args()
    if flags.stage == "measure":
        measure(flags)
        return
    record = read_json(RESULTS) if RESULTS.is_file() else {}
    for base, study in STUDIES.items():
        if (flags.work / base).is_dir():
            record[base] = agree(flags.work / base, study)
    write_json(RESULTS, record)


def rows_of(flags: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the rows of a base's tasks, shuffled once."""
    if flags.base == "embedded":
        tasks = {
            name: [json.loads(line) for line in (flags.rows / name / "train.jsonl").open()]
            for name in STUDIES["embedded"].draws
            if name != MIXTURE
        }
    else:
        tasks = real_rows(flags.data, flags.equations)
    for name, rows in tasks.items():
        random.Random(f"draws of {name}").shuffle(rows)
    # The last rows, one of each task in turn; the draws of a task alone take its first ones.
    count = sum(STUDIES[flags.base].draws[MIXTURE]) // len(tasks)
    rest = [rows[-count:] for rows in tasks.values()]
    tasks[MIXTURE] = [row for group in zip(*rest, strict=True) for row in group]
    return tasks


def real_rows(data: Path, equations: Path) -> dict[str, list[Row]]:
    """Return the tasks' rows as prompt and response."""
    gsm8k = map(json.loads, (data / "gsm8k/train.jsonl").open(encoding="utf-8"))
    tasks = {
        "equations": [json.loads(line) for line in equations.open(encoding="utf-8")],
        "gsm8k": [{"prompt": row["question"], "response": row["answer"]} for row in gsm8k],
    }
    for name, file in (
        ("code", "code/new_codealpaca.json"),
        ("alpaca", "chat/alpaca_en_demo.json"),
    ):
        tasks[name] = [
            {
                "prompt": f"{row['instruction']}\n{row['input']}".strip(),
                "response": row["output"],
            }
            for row in json.loads((data / file).read_text(encoding="utf-8"))
        ]
    return {
        name: [row for row in rows if len(row["prompt"]) + len(row["response"]) <= LONGEST]
        for name, rows in tasks.items()
    }


def measure(flags: argparse.Namespace) -> None:
    """Calibrate one base on every draw, up to each number of samples that is not there yet."""
    torch.set_num_threads(1)
    study, tasks = STUDIES[flags.base], rows_of(flags)
    source = str(flags.model or BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    config = TLoraConfig(r=study.rank, lora_alpha=study.rank, memory_budget=None)
    folder = flags.work / flags.base
    folder.mkdir(parents=True, exist_ok=True)
    # All draws at 16 samples before any at 32, so that a run cut short says something of each.
    for count, number in product(COUNTS, range(3)):
        for name, sizes in study.draws.items():
            file = folder / f"{name}-{number}-{count}.safetensors"
            if count > sizes[number] or file.is_file():
                continue
            own = tasks[name][sum(sizes[:number]) :][: sizes[number]]
            so_far = folder / f"{name}-{number}.state.safetensors"
            stats = grown(model, tokenizer, own[:count], config, study.form, so_far)
            keep(model, stats, config, file)
            print(name, number, count, flush=True)


def grown(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    config: TLoraConfig,
    form: dict[str, Any],
    so_far: Path,
) -> Calibration:
    """Return the calibration on ``rows``; ``so_far`` keeps that of the first ones, and grows."""
    stats = Calibration.load(so_far) if so_far.is_file() else None
    while stats is None or stats.samples < len(rows):
        done = stats.samples if stats else 0
        part = rows[done : done + CHUNK - done % CHUNK] if done else rows[:16]
        # By length, so that little is padding; an iterator is taken as it comes.
        drawn = iter(sorted(part, key=lambda row: len(row["prompt"] + row["response"])))
        batches = calibration_batches(tokenizer, drawn, len(part), batch_size=4, **form)
        found = calibrate(model, batches, config, progress=False)
        stats = found if stats is None else pooled(stats, found)
        stats.save(so_far)
    return stats


def keep(model: Any, stats: Calibration, config: TLoraConfig, file: Path) -> None:
    """Write S and the leading right singular vectors of W C."""
    equal = replace(config, allocate_rank=False, allocate_scale=False)
    bases = {
        name: m.lora_A for name, m in plan(model, stats, equal, progress=False).modules.items()
    }
    modules = [
        {"name": m.name, "shape": [m.d_out, m.d_in], "sensitivity": m.sensitivity}
        for m in stats.modules.values()
    ]
    write_tensors(file, bases, {"kind": "draw", "format": 1, "modules": modules})


def kept(file: Path) -> Measured:
    """Read what `keep` wrote."""
    bases, header = read_tensors(file, "draw", 1)
    modules = header["modules"]
    return Measured(
        {m["name"]: m["sensitivity"] for m in modules},
        {m["name"]: tuple(m["shape"]) for m in modules},
        {m["name"]: bases[m["name"]] for m in modules},
    )


def agree(folder: Path, study: Study) -> dict[str, Any]:
    """Return what a base's draws say: agreement between draws, numbers of samples and tasks."""
    found: dict[str, dict[int, dict[int, Measured]]] = {}
    for task, count, number in product(study.draws, COUNTS, range(3)):
        file = folder / f"{task}-{number}-{count}.safetensors"
        if file.is_file():
            found.setdefault(task, {}).setdefault(count, {})[number] = kept(file)
    best = {task: by_count[max(by_count)][0] for task, by_count in found.items()}
    first = next(iter(best.values()))
    count = min(max(by_count) for by_count in found.values())
    tasks = {task: by_count[count] for task, by_count in found.items()}
    return {
        "rank": study.rank,
        "modules": len(first.basis),
        "overlap_by_chance": round(by_chance(first), 4),
        "samples": {task: max(by_count) for task, by_count in found.items()},
        "concentration": {task: concentration(each) for task, each in best.items()},
        "between_draws": {
            task: {
                n: mean_agreement(combinations(draws.values(), 2)) for n, draws in by_count.items()
            }
            for task, by_count in found.items()
        },
        "with_most_samples": {
            task: {
                n: mean_agreement(_other_draws(draws, by_count[max(by_count)]))
                for n, draws in by_count.items()
            }
            for task, by_count in found.items()
        },
        "between_tasks": {
            "samples": count,
            "pairs": {
                f"{one}, {other}": mean_agreement(
                    product(tasks[one].values(), tasks[other].values())
                )
                for one, other in combinations(tasks, 2)
            },
        },
        "sensitivity": {
            task: {name: float(f"{s:.4g}") for name, s in each.sensitivity.items()}
            for task, each in best.items()
        },
        "provenance": provenance(None),
    }


def _other_draws(
    some: dict[int, Measured], others: dict[int, Measured]
) -> list[tuple[Measured, Measured]]:
    """Pair each draw with every other one, which shares no sample with it."""
    return [(some[i], others[j]) for i, j in product(some, others) if i != j]


if __name__ == "__main__":
    main()
