"""`tlora train` by each config of examples/accelerate in two processes, against one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from processes import Processes
from safetensors.torch import load_file

from tlora.training import train
from tlora.training.runfolder import RunFolder

BASE = str(files("tlora.demo") / "base")
ENGINES = ["ddp", "fsdp2", "two_nodes"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: Any) -> str:
    lines = [{"prompt": f"{n}+{n}=", "response": str(n + n)} for n in range(24)]
    file = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="session")
def alone(rows: str, tmp_path_factory: Any) -> RunFolder:
    """A run of one process."""
    folder = str(tmp_path_factory.mktemp("alone") / "run")
    return train.run(runs.config(BASE, rows, folder, batch_size=4))


def assert_same(found: RunFolder, expected: RunFolder) -> None:
    """Same losses at every step, same adapter."""
    logs = [[json.loads(line) for line in f.log.read_text().splitlines()] for f in (found, expected)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[1]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    name = "adapter_model.safetensors"
    adapter, other = (load_file(folder.adapter / name) for folder in (found, expected))
    assert adapter.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(adapter[key], value, rtol=0, atol=1e-5)
    assert max(v.abs().max() for k, v in other.items() if "lora_B" in k) > 1e-3


def launched(processes: Processes, engine: str, config: Any) -> RunFolder:
    said = processes.run(runs.trained, runs.environment(engine), config.to_dict())
    assert said == ["", ""]
    return RunFolder(config.output_dir)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_config_trains_in_two_processes_as_one_process_does(
    engine: str, rows: str, alone: RunFolder, processes: Processes, tmp_path: Path
) -> None:
    folder = launched(processes, engine, runs.config(BASE, rows, str(tmp_path / "run"), 2))
    assert folder.finished
    assert_same(folder, alone)
    checkpoint, own = folder.last_checkpoint(), alone.last_checkpoint()
    assert checkpoint is not None
    assert own is not None
    names = [{f.name for f in path.glob("[!r]*")} for path in (checkpoint, own)]
    assert names[0] == names[1]  # all but the random states, of which each process has one
