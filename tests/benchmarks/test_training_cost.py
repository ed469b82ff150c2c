"""What training keeps: the script counts what it says, and the page has what it found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tlora.files import read_json
from tlora.tasks.dataconfig import DataConfig
from tlora.training import dryrun
from tlora.training.runconfig import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32,
}
TOKENS, RANK, SIXTEEN = 128, 8, torch.bfloat16
WIDTHS = 6 * 64 + 160
"""Values a token of the inputs of all seven modules."""


@pytest.fixture
def cost(script):
    return script("cost", "training")


def test_a_frozen_a_keeps_z_alone_and_lora_every_input(cost):
    def kept(*kind):
        return cost.counted_layer(kind or None, SHAPE, TOKENS, RANK)

    base = kept()
    z = 2 * TOKENS * RANK * 7
    casts = 2 * RANK * (WIDTHS + 5 * 64 + 2 * 160)
    assert kept(True, SIXTEEN, 0.0) == base + z
    assert kept(True, torch.float32, 0.0) == base + z + casts
    assert kept(False, torch.float32, 0.0) == base + z + casts + 2 * TOKENS * WIDTHS
    # On a CPU a mask is as wide as a value.
    assert kept(True, torch.float32, 0.1) == base + z + casts + 4 * TOKENS * WIDTHS


@pytest.mark.parametrize(
    "name",
    ["frozen A, checkpointing", "frozen A, padding_free", "frozen A, packing"],
)
def test_what_saves_memory_changes_no_loss(cost, name, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "STEPS", 2)
    monkeypatch.setattr(cost, "SMALL", cost.SMALL | {"hidden_size": 64, "num_hidden_layers": 2})
    plain = cost.trained(cost.WAYS[cost.PLAIN], tmp_path)
    way = cost.trained(cost.WAYS[name], tmp_path)
    assert len(plain["losses"]) == 2
    assert way["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert way["kept"] < plain["kept"]
    assert (way["tokens"] < plain["tokens"]) == ("checkpointing" not in name)


def test_the_page_has_the_tables_that_are_committed(cost):
    found = read_json(ROOT / "benchmarks" / "cost" / "training.json")
    assert all(table in PAGE for table in cost.table(found).split("\n\n"))


def row(label: str) -> list[float]:
    """The figures of a line of the page's last table."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {label} |"))
    return [float(cell) for cell in re.findall(r"\d+\.\d+", line)]


LLAMA = {
    7: {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    70: {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
}


def predicted(tmp_path, billions, batch, **fields):
    heads = LLAMA[billions]["hidden_size"] // 128
    shape = {"model_type": "llama", "vocab_size": 32000, "num_attention_heads": heads}
    named = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(shape | named | LLAMA[billions]))
    config = RunConfig.from_dict(
        {
            "model": str(tmp_path),
            "adapter": {"r": 64, "lora_alpha": 64, "memory_budget": "2GiB"},
            "calibration": {"batch_size": 1},
            "trainer": {"per_device_train_batch_size": batch, "bf16": True, "use_cpu": True},
            **fields,
        }
    )
    config.data = DataConfig(max_length=512)
    return dryrun.run(config)


def rounded(*sizes: float) -> list[float]:
    return [round(size / 2**30, 1) for size in sizes if size]


def test_the_page_has_what_the_dry_run_says_of_a_7b_in_four_bits(tmp_path):
    for batch, again, label in (
        (8, True, "7B, nf4, batches of 8"),
        (4, False, "7B, nf4, batches of 4, not recomputed"),
    ):
        found = predicted(tmp_path, 7, batch, quantization="nf4")
        ours, calibration = found.training[0], found.calibration
        kept = ours.checkpointed if again else ours.activations
        steps = ours.gradients + ours.optimizer
        assert row(label) == rounded(ours.weights, steps, kept, ours.peak(again))
    kept = calibration.activations
    expected = rounded(calibration.weights, kept, calibration.peak())
    assert row("7B, nf4, calibration, batches of 1") == expected


def test_the_page_has_what_the_dry_run_says_of_a_70b_on_eight_cards(tmp_path):
    found = predicted(tmp_path, 70, 2)
    ours, calibration = found.training[0], found.calibration
    layer = 2 * sum(t.d_in * t.d_out for t in found.targets) / 80
    gathered = 2 * layer + 2 * 2 * 32000 * 8192
    weights, steps = ours.weights / 8, (ours.gradients + ours.optimizer) / 8
    peak = weights + steps + ours.checkpointed + gathered
    label = "70B on 8, batches of 2 a card"
    assert row(label) == rounded(weights, steps, ours.checkpointed, gathered, peak)
    weights, kept = calibration.weights / 8, calibration.activations
    peak = weights + kept + gathered + calibration.moments
    label = "70B on 8, calibration, batches of 1 a card"
    assert row(label) == rounded(weights, kept, gathered, peak)
