"""Presets are runs: the paper's settings, laid below files and flags."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tlora import presets
from tlora.config import TLoraConfig
from tlora.errors import ConfigError
from tlora.parsing import parse
from tlora.registry import METHODS, TASKS
from tlora.training.kinds import KINDS, check_trainer_fields
from tlora.training.runconfig import RunConfig

NAMES = [entry.name for entry in presets.entries()]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAPER = {
    # task: r = alpha, learning rate, schedule, warm-up share, global batch, rows
    "paper-math": ("math", 128, 2e-5, "cosine", 0.03, 128, 100_000),
    "paper-code": ("code", 128, 2e-5, "cosine", 0.03, 128, 100_000),
    "paper-chat": ("chat", 128, 2e-5, "cosine", 0.03, 128, 100_000),
    "paper-commonsense": ("commonsense", 32, 1e-4, "linear", None, 32, None),
}


def resolved(*words: str) -> RunConfig:
    return parse("tlora train", RunConfig, list(words)).record.resolved()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_are_the_papers(name):
    run = resolved("--preset", name)
    task, rank, rate, schedule, warmup, batch, rows = PAPER[name]
    assert (run.model, run.task, run.method) == ("meta-llama/Llama-2-7b-hf", task, "tlora")
    assert run.dtype == "bfloat16"
    options = TLoraConfig(**run.adapter)
    assert (options.r, options.lora_alpha) == (rank, rank)
    assert options.target_modules == PROJECTIONS
    # What the paper's method is: both allocations, calibrated and frozen A, the released scales.
    defaults = TLoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
    assert options == defaults
    trainer = run.trainer
    assert trainer["learning_rate"] == rate
    assert trainer["lr_scheduler_type"] == schedule
    assert trainer.get("warmup_steps") == warmup
    per_step = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    assert per_step == batch
    assert trainer["num_train_epochs"] == 1
    assert trainer["optim"].startswith("adamw")
    assert (run.data.max_length, run.data.loss_on) == (512, "response")
    assert run.data.max_train_rows == rows


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_run_that_the_trainer_takes(name):
    run = resolved(f"--preset={name}")
    task = TASKS.load(run.task)(run.data)
    check_trainer_fields(KINDS[task.kind], run.trainer)
    assert task.hub is not None


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_opens_with_what_it_is_and_its_command(name):
    lines = Path(presets.path(name)).read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("# ")]
    assert lines[0].startswith("# ")
    assert any(f"tlora train --preset {name}" in line for line in head)
    assert all(len(line) <= 100 for line in lines)


def test_flags_win_over_files_and_files_over_presets(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"adapter": {"r": 16, "lora_alpha": 16}, "seed": 3}))
    words = ["--adapter.r", "4", "--config", str(file), "--preset", "paper-math"]
    run = resolved(*words)
    assert (run.adapter["r"], run.adapter["lora_alpha"], run.seed) == (4, 16, 3)
    assert run.trainer["learning_rate"] == 2e-5
    assert run.adapter["target_modules"] == PROJECTIONS
    assert run == resolved(*words[4:], *words[:4])  # wherever it stands


def test_an_unknown_preset_is_met_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"'paper-mth'\. Did you mean 'paper-math'\?"):
        resolved("--preset", "paper-mth")
    with pytest.raises(ConfigError, match="tlora list presets"):
        presets.path("zzz")
    with pytest.raises(ConfigError, match="--preset needs a value"):
        resolved("--preset")


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_takes_a_preset_and_of_its_options_those_that_it_has(method):
    run = resolved("--preset", "paper-math", "--method", method)
    preset = yaml.safe_load(Path(presets.path("paper-math")).read_text())["adapter"]
    assert run.method == method
    assert {name: run.adapter.get(name, value) for name, value in preset.items()} == preset


def test_an_option_that_the_user_gives_is_not_left_out(tmp_path):
    words = ["--preset", "paper-math", "--method", "full"]
    with pytest.raises(ConfigError, match="option `r`"):
        resolved(*words, "--adapter.r", "4")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"adapter": {"lora_alpha": 16}}))
    with pytest.raises(ConfigError, match="option `lora_alpha`"):
        resolved(*words, "--config", str(file))
