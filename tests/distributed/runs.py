"""`tlora train` in every process of the tests at once, launched as a config of accelerate asks."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState

from tlora.errors import TLoraError
from tlora.training import sharded, train
from tlora.training.arguments import training_arguments
from tlora.training.runconfig import CalibrationConfig, RunConfig
from tlora.training.runfolder import RunFolder
from tlora.training.setup import settle

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


def held(variables: dict[str, str], fields: dict[str, Any]) -> tuple[float, bool]:
    """Return the share of the base's bytes here, and whether the trained model has these only."""
    with launch(variables):
        setup = settle(RunConfig.from_dict(fields))
        arguments = training_arguments(setup, Path(setup.config.output_dir))
        plugin = sharded.fsdp_of(arguments)
        bases: list[Any] = []
        load = setup.load_model
        setup.load_model = lambda *args, **kwargs: bases.append(load(*args, **kwargs)) or bases[0]
        model = sharded.adapt(setup, arguments.device, plugin).model
        parts = [parameter.to_local() for parameter in bases[0].parameters()]
        here = sum(part.nbytes for part in parts)
        places = {part.untyped_storage().data_ptr() for part in parts}
        own = {
            parameter.to_local().untyped_storage().data_ptr()
            for name, parameter in model.named_parameters()
            if "lora_" not in name
        }
        return here / sum(parameter.nbytes for parameter in bases[0].parameters()), own <= places


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
