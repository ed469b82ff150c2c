"""The same seed and samples give the same plan, bit for bit, in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers

import support
from tlora import AdapterPlan, TLoraConfig, calibrate, plan
from tlora.adapter.blocks import plan_in_blocks


def write_plans(folder: str) -> None:
    """Calibrate and plan by each solver; write the plans into ``folder``."""
    # Wide enough, and tokens enough, that the randomized solver is not the exact one.
    llama: Any = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    model = support.seeded(lambda: transformers.LlamaForCausalLM(llama))
    batches = support.in_batches(support.causal_samples((17, 13, 20, 15, 12)), 2)
    fields: dict[str, Any] = {"r": 8, "seed": 3}
    config = TLoraConfig(**fields, subspace="randomized")
    stats = calibrate(model, batches, config)
    plans = {
        "randomized": plan(model, stats, config),
        "random": plan(model, stats, TLoraConfig(**fields, basis="random")),
        "streamed": plan_in_blocks(model, batches, TLoraConfig(**fields, covariance="streamed")),
    }
    for name, one in plans.items():
        one.save(Path(folder) / f"{name}.safetensors")


def test_two_processes_plan_the_same(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    write_plans(str(here))
    paths = [str(Path(module).parent) for module in (__file__, support.__file__)]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_reproducible as t; "
    # Another seed of the hash: no order of a set may show in the plan.
    other = str((int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")) + 1) % 1000)
    subprocess.run(
        [sys.executable, "-c", f"{code}t.write_plans({str(there)!r})"],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": other},
    )

    for solver in ("randomized", "random", "streamed"):
        one, two = (folder / f"{solver}.safetensors" for folder in (here, there))
        assert one.read_bytes() == two.read_bytes(), solver
        assert {m.solver for m in AdapterPlan.load(one).modules.values()} == {solver}
