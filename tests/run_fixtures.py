"""Fixtures of short runs: a model's folder, rows, and the record of a run on them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlora.tasks.dataconfig import DataConfig
from tlora.training.runconfig import CalibrationConfig, RunConfig


@pytest.fixture(scope="session", autouse=True)
def one_fork_server():
    """Let the first queue of the session start a fork server that serves real runs too."""
    from tlora.compare.compare import PRELOAD

    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD])


@pytest.fixture(scope="session")
def llama_folder(saved, tiny_llama) -> str:
    return saved(tiny_llama())


def sums_of(numbers: range, file: Path) -> str:
    rows = [{"prompt": f"{n}+{n}?", "response": f" {'so ' * (n % 5)}{n + n}"} for n in numbers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> str:
    """A JSONL of 24 prompts with responses of different lengths."""
    return sums_of(range(24), tmp_path_factory.mktemp("rows") / "sums.jsonl")


@pytest.fixture(scope="session")
def other_sums(tmp_path_factory) -> str:
    """A JSONL of 24 other prompts, to evaluate on."""
    return sums_of(range(24, 48), tmp_path_factory.mktemp("rows") / "other-sums.jsonl")


@pytest.fixture(scope="session")
def config_in(llama_folder, sums) -> Callable[..., RunConfig]:
    """Make a short run in a folder: six steps of two rows, a checkpoint every second step."""

    def make(output_dir: Path, **fields: Any) -> RunConfig:
        trainer = {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        fields = {
            "model": llama_folder,
            "train_file": sums,
            "output_dir": str(output_dir),
            "adapter": {"r": 4, "lora_dropout": 0.1},
            "calibration": CalibrationConfig(samples=4, batch_size=2),
            "data": DataConfig(format="raw"),
            **fields,
        }
        return RunConfig(**fields | {"trainer": trainer | fields.get("trainer", {})})

    return make


@pytest.fixture
def config(config_in, tmp_path) -> Callable[..., RunConfig]:
    """The same, in a folder of this test."""
    return lambda output_dir="run", **fields: config_in(tmp_path / output_dir, **fields)


@pytest.fixture(scope="session")
def whole(config_in, tmp_path_factory) -> Callable[[str], bytes]:
    """Return the final weights of a method's run that nothing interrupts, run once."""

    from tlora.training import train

    @functools.cache
    def weights(method: str) -> bytes:
        folder = train.run(config_in(tmp_path_factory.mktemp("whole") / method, method=method))
        return (folder.adapter / "adapter_model.safetensors").read_bytes()

    return weights


@pytest.fixture(scope="session")
def stopped(config_in, tmp_path_factory):
    """Return the folder of a run that Ctrl-C stopped after a step; made once."""

    from tlora.training import train
    from tlora.training.trainers import LogCallback

    @functools.cache
    def run(method, step):
        def stop(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

        path = tmp_path_factory.mktemp("stopped") / method
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LogCallback, "on_step_end", stop)
            train.run(config_in(path, method=method))
        return path

    return run


@pytest.fixture
def cut(stopped, tmp_path):
    """A copy of such a folder, for a test of its own: two steps are in a checkpoint."""

    from tlora.training.runfolder import RunFolder

    def copy(method="tlora", step=3):
        return RunFolder(shutil.copytree(stopped(method, step), tmp_path / "run"))

    return copy
