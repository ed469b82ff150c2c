"""`tlora train` in every process of the tests at once, launched as a config of accelerate asks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tlora.errors import TLoraError
from tlora.training import sharded, train
from tlora.training.runconfig import CalibrationConfig, RunConfig
from tlora.training.runfolder import RunFolder

BASE = str(files("tlora.demo") / "base")
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


def environment(name: str) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for a config of the examples."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "tlora.cli"]
    words = launch.launch_command_parser().parse_args(command)
    arguments, *_ = launch._validate_launch_command(words)
    assert isinstance(arguments, argparse.Namespace)
    return {
        key: value
        for key, value in prepare_multi_gpu_env(arguments).items()
        if key.startswith(("ACCELERATE_", "FSDP_")) and os.environ.get(key) != value
    }


def config(base: str, rows: str, folder: str, batch_size: int, **fields: Any) -> RunConfig:
    """Return a short run: four steps, a checkpoint at each second one."""
    adapter, trainer = fields.pop("adapter", {}), fields.pop("trainer", {})
    return RunConfig(
        model=base,
        train_file=rows,
        output_dir=folder,
        adapter={"r": 2, **adapter},
        calibration=CalibrationConfig(samples=6, batch_size=2),
        trainer={
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": batch_size,
            "disable_tqdm": True,
            **trainer,
        },
        **fields,
    )


def flags(config: RunConfig) -> list[str]:
    """Return a run's fields as `tlora train` takes them."""
    given = {
        "preset": "paper-rule",  # as in Python
        "model": config.model,
        "train_file": config.train_file,
        "output_dir": config.output_dir,
        "calibration.samples": config.calibration.samples,
        "calibration.batch_size": config.calibration.batch_size,
        **{f"adapter.{name}": value for name, value in config.adapter.items()},
        **{f"trainer.{name}": value for name, value in config.trainer.items()},
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@contextlib.contextmanager
def launch(variables: dict[str, str]) -> Iterator[None]:
    """Let the body see what a launch sets in this process."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    before = dict(os.environ)
    os.environ.update(variables)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)


def trained(variables: dict[str, str], fields: dict[str, Any]) -> str:
    """Train in this process's share of a launch; return what was refused, or nothing."""
    try:
        with launch(variables):
            train.run(RunConfig.from_dict(fields))
        return ""
    except TLoraError as error:
        return str(error)


def held(variables: dict[str, str], fields: dict[str, Any]) -> tuple[float, bool, float]:
    """Train; return what this process held of the base's bytes.

    Returns:
        The share of its parts, whether the trained model has these and no copies, and the largest
        share that was gathered at a time.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    seen: dict[str, Any] = {}
    gathered: dict[int, int] = {}
    peak = 0
    adopt, gather, release = sharded.adopt, FSDPParam.to_unsharded, FSDPParam.to_sharded

    def noted(model: Any, base: Any, plan: Any) -> None:
        adopt(model, base, plan)
        parts = [parameter.to_local() for parameter in base.parameters()]
        places = {part.untyped_storage().data_ptr() for part in parts}
        own = {n: p.to_local() for n, p in model.named_parameters() if "lora_" not in n}
        seen["bytes"] = sum(parameter.nbytes for parameter in base.parameters())
        seen["here"] = sum(part.nbytes for part in parts)
        seen["own"] = {part.untyped_storage().data_ptr() for part in own.values()} <= places

    def gathering(parameter: Any) -> None:
        nonlocal peak
        gather(parameter)
        gathered[id(parameter)] = parameter._unsharded_param.nbytes
        peak = max(peak, sum(gathered.values()))

    def releasing(parameter: Any) -> None:
        release(parameter)
        gathered.pop(id(parameter), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "adopt", noted)
        patch.setattr(FSDPParam, "to_unsharded", gathering)
        patch.setattr(FSDPParam, "to_sharded", releasing)
        said = trained(variables, fields)
    assert not said, said
    return seen["here"] / seen["bytes"], seen["own"], peak / seen["bytes"]


def stop_at(folder: RunFolder, step: int, processes: int) -> None:
    """Leave a finished run as one that was stopped after the checkpoint of a step."""
    shutil.rmtree(folder.adapter)
    for checkpoint in folder.checkpoints.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        folder.start(folder.config(), "train", None, folder.inputs())
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def losses(folder: RunFolder) -> list[float]:
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_same(found: RunFolder, expected: RunFolder, tolerance: float = 1e-5) -> None:
    """Same losses at every step, same adapter."""
    logs = [
        [json.loads(line) for line in f.log.read_text().splitlines()] for f in (found, expected)
    ]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[1]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    name = "adapter_model.safetensors"
    adapter, other = (load_file(folder.adapter / name) for folder in (found, expected))
    assert adapter.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(adapter[key], value, rtol=0, atol=tolerance)
    assert max(v.abs().max() for k, v in other.items() if "lora_B" in k) > 1e-4
