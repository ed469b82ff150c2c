"""Evaluations that no model made: folders as `tlora eval` leaves them, scores drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlora.evaluate.evalfolder import EvalFolder
from tlora.files import read_state, write_state

PROVENANCE = {
    "python": "3.11.7",
    "packages": {"tlora": "0.1.0", "torch": "2.13.0"},
    "git": {"commit": "0" * 40, "dirty": False},
    "hardware": {"cpu": "A processor", "cores": 2, "gpus": []},
}
Line = dict[str, Any]


def lines(scores: Sequence[float], metric: str = "exact_match", seed: int = 0) -> list[Line]:
    """Return samples with these scores, of sums that are answered right or wrong."""
    draw = random.Random(seed)
    made = []
    for place, score in enumerate(scores):
        answer = str(place + 10 if score == 1 else place - draw.randint(1, 9))
        made.append(
            {
                "item": f"sum-{place}",
                "prompt": f"Ann has {place} apples and buys 10 more.\nHow many has she now?",
                "reply": f"She has {place} + 10 apples.\nThe answer is: {answer}",
                "answer": answer,
                "target": str(place + 10),
                "scores": {metric: score},
            }
        )
    return made


def drawn(count: int, shares: Sequence[float], seed: int = 0) -> list[list[float]]:
    """Return right and wrong of several models that find the same items hard."""
    draw = random.Random(seed)
    hard = [draw.random() for _ in range(count)]
    return [[float(h + draw.gauss(0, 0.15) < share) for h in hard] for share in shares]


def write(folder: Path, tasks: Mapping[str, Mapping[str, list[Line]]], **fields: Any) -> Path:
    """Write samples by task and model; ``fields`` go to eval.json."""
    models = list(next(iter(tasks.values())))
    listed = []
    for task, by_model in tasks.items():
        metrics = list(next(iter(by_model.values()))[0]["scores"])
        for model, made in by_model.items():
            EvalFolder(folder).write_samples(model, task, made)
        scores = {
            model: {m: sum(line["scores"][m] for line in made) / len(made) for m in metrics}
            for model, made in by_model.items()
        }
        listed.append(
            {
                "name": task,
                "metrics": metrics,
                "protocol": "The answer after the last words is compared with the target.",
                "items": len(next(iter(by_model.values()))),
                "shots": 0,
                "scores": scores,
                "seconds": dict.fromkeys(by_model, 1.0),
            }
        )
    kinds = {"base": "base"}
    found = {
        "config": {"tasks": list(tasks), "seed": 0},
        "provenance": PROVENANCE,
        "models": [{"name": name, "kind": kinds.get(name, "adapter")} for name in models],
        "tasks": listed,
    }
    EvalFolder(folder).write(found | fields)
    return folder


def change(folder: Path, **fields: Any) -> None:
    """Lay ``fields`` over eval.json."""
    file = folder / "eval.json"
    write_state(file, read_state(file) | fields)
