"""A comparison whose runs were never run: records as a real one leaves them, scores drawn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.trials import Comparison, Trial
from tlora.registry import METHODS

RATES = [3e-4, 1e-3, 3e-3]
PROVENANCE = {
    "python": "3.11.7",
    "packages": {"tlora": "0.1.0", "torch": "2.13.0"},
    "git": {"commit": "0" * 40, "dirty": False},
    "hardware": {"cpu": "A processor", "cores": 2, "gpus": []},
}


def comparison(folder: Path, **fields: Any) -> Comparison:
    """Return a comparison of four methods; nothing is written."""
    config = CompareConfig(
        **{
            "title": "A small model on a small task",
            "model": "model",
            "train_file": "train.tsv",
            "test_file": "test.tsv",
            "task": "sst2",
            "methods": ["tlora", "lora", "dora", "full"],
            "learning_rates": RATES,
            "output_dir": str(folder),
        }
        | fields
    )
    return Comparison(config, "accuracy", "higher", "experiment")


def every_method() -> list[str]:
    return METHODS.names()


def write(
    made: Comparison, gaps: dict[str, float] | None = None, noise: float = 0.004, seed: int = 0
) -> CompareFolder:
    """Write every run; ``gaps`` are added to the scores of the labels that they name."""
    folder = CompareFolder(made.config.output_dir)
    folder.start(
        {
            "config": made.config.to_dict(),
            "defaults": {each.name: each.changed_defaults() for each in made.config.entries()},
            "experiment": made.experiment,
            "metric": made.metric,
            "better": made.better,
            "first_try": made.first_try,
        }
    )
    draw = random.Random(seed)
    luck = {s: draw.gauss(0, 0.01) for s in (*made.config.tuning_seeds, *made.config.final_seeds)}
    for place, entry in enumerate(made.config.entries()):
        base = 0.8 + (gaps or {}).get(entry.label, 0.0)
        for trial in made.tuning_of(entry):
            penalty = 0.02 * abs(entry.learning_rates.index(trial.learning_rate) - place % 3)
            value = base - penalty + luck[trial.seed] + draw.gauss(0, noise)
            folder.write_record(trial.name, record(trial, "validation", value, place, made))
        chosen = made.chosen(entry, folder)
        assert chosen is not None
        for rate in made.final_rates(entry, folder):
            for trial in made.final(entry, rate):
                value = base - 0.02 * (rate != chosen) + luck[trial.seed] + draw.gauss(0, noise)
                folder.write_record(trial.name, record(trial, "test", value, place, made))
    return folder


def record(trial: Trial, rows: str, score: float, place: int, made: Comparison) -> dict[str, Any]:
    planned = place == 0
    trained = 22_000_000 if trial.entry.name == "full" else 331_776 // (1 + place % 5)
    modules = [
        f"bert.encoder.layer.{layer}.{name}"
        for layer in range(6)
        for name in ("attention.self.query", "attention.self.key", "output.dense")
    ]
    return trial.record() | {
        "status": "finished",
        "scores": {rows: {made.metric: round(score * 872) / 872, "loss": 1 - score}},
        "rows": {"train": 1000, rows: 872 if rows == "test" else 500},
        "steps": 96,
        "batch": 32,
        "autocast": None,
        "data_order": f"order of seed {trial.seed}",
        "curves": {"loss": [[s, 0.7 * 0.97 ** (s / (2 + place % 3))] for s in range(1, 96, 5)]},
        "parameters": {"adapter": trained, "others": 770},
        "memory": {"bytes": (1000 + place) * 2**20, "what": "most memory", "device": "cpu"},
        "seconds": {"load": 0.1, "initialise": 0.05 + place, "train": 49.0 + place},
        "plan": {
            name: {"rank": 1 + (3 * number + place) % 17, "scale": 1 + number / 7}
            for number, name in enumerate(modules)
        }
        if planned
        else None,
        "config": {},
        "provenance": PROVENANCE,
        "threads": 1,
    }
