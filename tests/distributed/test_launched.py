"""`tlora train` under torchrun: one run folder, the plan of one process, one adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from runs import CONFIGS, stop_at
from safetensors.torch import load_file
from test_group import assert_same_plan

from tlora import AdapterPlan
from tlora.training import initialize
from tlora.training.runconfig import CalibrationConfig, RunConfig
from tlora.training.runfolder import RunFolder

BASE = str(files("tlora.demo") / "base")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    lines = [{"prompt": f"{n}+{n}=", "response": str(n + n)} for n in range(24)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def launched(*commands: list[str]) -> list[str]:
    """Run commands at the same time; return what each writes to stdout and stderr."""
    words = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if sys.platform != "linux":
        del words["GLOO_SOCKET_IFNAME"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **words},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate(timeout=1200)[0] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return said


def test_train_under_torchrun_is_one_run_with_the_plan_of_one_process(rows, tmp_path):
    flags = {
        "preset": "paper-rule",
        "model": BASE,
        "train_file": rows,
        "output_dir": str(tmp_path / "run"),
        "adapter.r": "2",
        "calibration.samples": "5",
        "calibration.batch_size": "2",
        "trainer.max_steps": "2",
        "trainer.save_steps": "1",
        "trainer.per_device_train_batch_size": "2",
        "trainer.disable_tqdm": "true",
    }
    command = ["-m", "tlora.cli", "train"]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    [said] = launched([*torchrun, *command])
    folder = RunFolder(tmp_path / "run")
    assert folder.finished
    assert (folder.adapter / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "sums.jsonl"]
    # The manifest waits for the random state of every process.
    manifest = json.loads((folder.last_checkpoint() / "manifest.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest["files"])
    # The processes train together: two rows each of 24 a step, and one of them writes the log.
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["epoch"] for line in log] == [pytest.approx(2 * 4 / 24)]
    # One process speaks.
    assert said.count(f"adapter: {folder.adapter}") == 1
    config = RunConfig(
        model=BASE,
        train_file=rows,
        output_dir=str(tmp_path / "alone"),
        adapter={"r": 2},
        calibration=CalibrationConfig(samples=5, batch_size=2),
        trainer={"use_cpu": True},
    )
    expected = AdapterPlan.load(initialize.run(config).plan)
    found = AdapterPlan.load(folder.plan)
    assert found.info["samples"] == expected.info["samples"] == 5
    assert_same_plan(found, expected)
    # The same command resumes it under FSDP2, as two machines of one process each.
    weights = load_file(folder.adapter / "adapter_model.safetensors")
    stop_at(folder, 1, processes=2)
    said = launched(*(accelerate("two_nodes", "--machine_rank", n) + command for n in "01"))
    assert "".join(said).count(f"Resuming {folder.path} at step 1.") == 1
    again = load_file(folder.adapter / "adapter_model.safetensors")
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-5)


def accelerate(config: str, *words: str) -> list[str]:
    """Return the launcher's words for two processes by a config of the examples."""
    file = str(CONFIGS / f"{config}.yaml")
    return ["accelerate.commands.launch", "--config_file", file, "--num_processes", "2", *words]
