"""Gathers trainable parameters of a sharded model for saving, and scatters them after loading.

Checkpoints and the adapter have the same form as from one process, so any number of processes can
resume them, sharded or not. The base is never gathered.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlora.calibration.placement import is_dtensor, is_zero3, local_part

if TYPE_CHECKING:
    from tlora.methods.base import Prepared

_ADAPTER = "default"


def like(old: Any, whole: Tensor) -> Tensor:
    """Return ``whole``, which every process has, sharded like ``old`` and in its dtype."""
    from torch.distributed.tensor import distribute_tensor

    if not is_dtensor(old):
        return whole.to(old.device, old.dtype)
    whole = whole.to(old.device_mesh.device_type, old.dtype)
    return distribute_tensor(whole, old.device_mesh, old.placements, src_data_rank=None)


def gathered(value: Any) -> Any:
    """Return a tensor whole, on the CPU, or another value unchanged; every process must call it."""
    if is_zero3(value):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().cpu().clone()
    if is_dtensor(value):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def fit_trainer(trainer: Any) -> None:
    """Make a trainer use an already sharded model, with checkpoints like those of one process.

    By default it would wrap the model by DDP and write only the local part. DeepSpeed's engine
    keeps its own checkpoints beside the adapter.
    """
    arguments, optimizer_file, scheduler_file = trainer.args, "optimizer.pt", "scheduler.pt"
    accelerator = trainer.accelerator

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = adapter_state(trainer.model)
        if arguments.should_save:
            trainer._save(output_dir or arguments.output_dir, state_dict=state)

    def save_optimizer(output_dir: str) -> None:
        state = optimizer_state(trainer.optimizer)
        if arguments.should_save:
            torch.save(state, Path(output_dir) / optimizer_file)
            torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / scheduler_file)

    def load(checkpoint: str, model: Any = None) -> None:
        load_adapter_state(trainer.model, Path(checkpoint))

    def load_best() -> None:
        load(trainer.state.best_model_checkpoint)

    def load_optimizer(checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
        load_optimizer_state(trainer.optimizer, read(Path(checkpoint) / optimizer_file))
        trainer.lr_scheduler.load_state_dict(read(Path(checkpoint) / scheduler_file))

    trainer.save_model = save_model
    if trainer.is_deepspeed_enabled:
        return
    # This keeps autocast, and neither moves nor wraps the model.
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
    trainer._save_optimizer_and_scheduler = save_optimizer
    trainer._load_from_checkpoint = load
    trainer._load_best_model = load_best
    trainer._load_optimizer_and_scheduler = load_optimizer


def gather(prepared: Prepared) -> None:
    """Gather the adapter on every process, for the process that saves it."""
    state = adapter_state(prepared.model)
    model: Any = prepared.model
    prepared.writer = lambda folder: model.save_pretrained(folder, state_dict=state)


def _saved_names(model: Any) -> dict[str, str]:
    """Return the full names of the tensors that PEFT saves, by their names in the file."""
    from peft import get_peft_model_state_dict

    # PEFT only selects by name, so any value can stand for the tensors.
    names = {name: name for name in model.state_dict()}
    return get_peft_model_state_dict(model, names, _ADAPTER, save_embedding_layers=False)


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Gather the tensors that PEFT saves for a sharded model; every process must call it."""
    state = dict(model.named_parameters(remove_duplicate=False))
    return {name: gathered(state[name]) for name in _saved_names(model).values()}


def load_adapter_state(model: Any, folder: Path) -> None:
    """Load the adapter in ``folder`` into a sharded model, in place."""
    from safetensors.torch import load_file

    saved, state = load_file(folder / "adapter_model.safetensors"), model.state_dict()
    for short, name in _saved_names(model).items():
        _copy(state[name], saved[short])


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Gather an optimizer's state; every process must call it."""
    state = optimizer.state_dict()
    whole = {
        index: {name: gathered(value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {"state": whole, "param_groups": state["param_groups"]}


def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Load a whole state into an optimizer of sharded parameters, sharding it."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]

    def part(old: Tensor, value: Tensor) -> Tensor:
        # Moments have the parameter's shape; step counters are scalars.
        return like(old, value) if value.shape == old.shape else value

    state = {
        index: {name: part(parameters[index], value) for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _copy(target: Any, whole: Tensor) -> None:
    with torch.no_grad():
        local_part(target).copy_(local_part(like(target, whole)))
