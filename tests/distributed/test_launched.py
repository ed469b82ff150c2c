"""`tlora train` under torchrun: one run folder, the plan of one process, one adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from test_group import assert_same_plan

from tlora import AdapterPlan
from tlora.errors import ConfigError
from tlora.training import initialize, train
from tlora.training.runconfig import CalibrationConfig, RunConfig
from tlora.training.runfolder import RunFolder

BASE = str(files("tlora.demo") / "base")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    lines = [{"prompt": f"{n}+{n}=", "response": str(n + n)} for n in range(24)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def launched(command: list[str]) -> Any:
    words = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if sys.platform != "linux":
        del words["GLOO_SOCKET_IFNAME"]
    done = subprocess.run(
        command,
        env={**os.environ, **words},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_train_under_torchrun_is_one_run_with_the_plan_of_one_process(rows, tmp_path):
    flags = {
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tlora.cli", "train"]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = launched(command)
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
    assert done.stdout.count(f"adapter: {folder.adapter}") == 1
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
    # All processes of the same command resume what was stopped, to the same weights.
    weights = (folder.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder.adapter)
    shutil.rmtree(folder.checkpoints / "checkpoint-2")
    folder.start(folder.config(), "train", None, folder.inputs())
    said = launched(command).stderr
    assert said.count(f"resuming the run in {folder.path} from step 1.") == 1
    assert (folder.adapter / "adapter_model.safetensors").read_bytes() == weights


def test_engines_whose_weights_a_run_cannot_save_are_refused_first(
    rows: str, tmp_path: Path, monkeypatch: Any
) -> None:
    config = RunConfig(
        model=BASE, train_file=rows, output_dir=str(tmp_path / "run"), trainer={"use_cpu": True}
    )
    for name, value in (("USE_FSDP", "true"), ("DEEPSPEED_ZERO_STAGE", "3")):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_{name}", value)
            with pytest.raises(ConfigError, match="tlora init"):
                train.run(config)
    assert not (tmp_path / "run").exists()
