"""`tlora train` in every process of the tests at once, launched as a config of accelerate asks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tlora.errors import TLoraError
from tlora.training import sharded, train
from tlora.training.runconfig import CalibrationConfig, RunConfig
from tlora.training.runfolder import RunFolder

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


def trained(variables: dict[str, str], fields: dict[str, Any]) -> str:
    """Train in this process's share of a launch; return what was refused, or nothing."""
    from accelerate.state import AcceleratorState

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    before = dict(os.environ)
    os.environ.update(variables)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        train.run(RunConfig.from_dict(fields))
        return ""
    except TLoraError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)


def stop_at(folder: RunFolder, step: int, processes: int) -> None:
    """Leave a finished run as one that was stopped after the checkpoint of a step."""
    import shutil

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
