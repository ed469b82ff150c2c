"""A dry run says the memory budget of this machine, and how calibration keeps to it."""

import json

import pytest
import torch

from support import LLAMA_2_7B
from tlora.calibration import budget
from tlora.report.estimate import show
from tlora.tasks.dataconfig import DataConfig
from tlora.training import dryrun
from tlora.training.runconfig import RunConfig

GIB = 2**30


@pytest.fixture
def predict(tmp_path):
    """Return the dry run of four layers of Llama-2-7B."""
    config = LLAMA_2_7B | {"dtype": "bfloat16", "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def run(trainer=None, **adapter):
        options = {"r": 2, "lora_alpha": 2} | adapter
        data, name = DataConfig(max_length=64), str(tmp_path)
        return dryrun.run(RunConfig(model=name, data=data, adapter=options, trainer=trainer or {}))

    return run


@pytest.fixture
def gpu(monkeypatch):
    """Let torch find an accelerator of 24 GiB."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(budget, "total_memory", lambda _: 24 * GIB)


def test_a_memory_budget_lowers_what_is_held_and_costs_passes(predict, capsys):
    whole = predict(memory_budget=None).strategy
    dry = predict(memory_budget="1GiB")
    within = dry.strategy
    assert within.held <= GIB < whole.held
    assert within.total == whole.held
    assert within.passes > 1
    show(dry)
    assert "`memory_budget`: 1.0 GiB." in capsys.readouterr().out


def test_auto_is_that_of_the_accelerator_that_would_calibrate(predict, gpu, capsys):
    dry = predict()
    weights = dry.calibration.weights
    assert dry.budget.bytes == (24 * GIB - weights) // 20
    given = predict(memory_budget=dry.budget.bytes).strategy
    assert len(dry.strategy.blocks[0]) < len(given.blocks[0])  # beside activations
    assert dry.strategy.held <= dry.budget.bytes
    show(dry)
    printed = capsys.readouterr().out
    assert dry.strategy.summary()[1:] in printed
    assert f"`memory_budget`: {dry.budget.explained()}." in printed


def test_auto_is_no_limit_on_the_cpu(predict, gpu, capsys):
    dry = predict(trainer={"use_cpu": True})
    assert dry.budget.bytes is None
    assert dry.strategy == predict(memory_budget=None).strategy
    show(dry)
    assert "memory_budget" not in capsys.readouterr().out
