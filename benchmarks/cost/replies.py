"""Replies a second of the embedded base, of the base with an adapter, and with it merged in.

    python benchmarks/cost/replies.py

Every model answers the same 192 problems with 16 new tokens each, none of which ends a reply, so
that all do the same work; the middle of five rounds counts, in which the models take turns. The
batch sizes are 1, 8 and 32. Figures and machine go to replies.json beside this file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tlora.demo import corpus
from tlora.demo.run import BASE_MODEL
from tlora.evaluate import loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import resolve
from tlora.evaluate.lm import TransformersLM
from tlora.files import write_json
from tlora.training.runfolder import provenance

PROBLEMS, TOKENS, ROUNDS, RANK = 192, 16, 5, 8


def adapter(folder: str) -> str:
    """Write a LoRA adapter of every Linear, B drawn at random: its arithmetic is what counts."""
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    config = LoraConfig(
        r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def seconds(lm: TransformersLM, prompts: list[str]) -> float:
    """Return how long the replies to all prompts take."""
    generation = {"until": [], "max_gen_toks": TOKENS, "min_new_tokens": TOKENS}
    asked = [
        Instance("generate_until", {}, (prompt, dict(generation)), 0, metadata=("t", n, 1))
        for n, prompt in enumerate(prompts)
    ]
    start = time.perf_counter()
    lm.generate_until(asked)
    return time.perf_counter() - start


def measure(models: list[tuple[str, TransformersLM]], prompts: list[str], size: int) -> Any:
    """Return replies a second by model, at one batch size."""
    taken: dict[str, list[float]] = {name: [] for name, _ in models}
    for _ in range(ROUNDS):
        for name, lm in models:
            lm.batch_size_per_gpu = size
            taken[name].append(seconds(lm, prompts))
    return {name: round(len(prompts) / statistics.median(each), 1) for name, each in taken.items()}


def main() -> None:
    """Measure, print a table, write the figures."""
    torch.manual_seed(0)
    _, rows = corpus.shifted_task(seed=0, train=0, test=PROBLEMS)
    prompts = [row["prompt"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        config = EvalConfig(
            models=[f"lora={adapter(folder)}"], with_base=True, with_merged=True, tasks=["none"]
        )
        models = [
            (
                subject.kind,
                TransformersLM(
                    loading.load(subject, config),
                    loading.load_tokenizer(subject, config),
                    config,
                    subject.head,
                ),
            )
            for subject in resolve(config)
        ]
    measure(models, prompts[:16], 8)  # warm
    found = {size: measure(models, prompts, size) for size in (1, 8, 32)}
    print(f"{'batch':>5}" + "".join(f"{kind:>10}" for kind in found[1]))
    for size, each in found.items():
        print(f"{size:>5}" + "".join(f"{value:>10}" for value in each.values()))
    write_json(
        Path(__file__).with_suffix(".json"),
        {
            "replies_per_second": found,
            "problems": PROBLEMS,
            "new_tokens": TOKENS,
            "rounds": ROUNDS,
            "rank": RANK,
            "provenance": provenance(seed=0),
        },
    )


if __name__ == "__main__":
    main()
