"""What the processes of the tests do; each function runs in every process at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import TrainerControl

from support import causal_samples, padded
from tlora import AdapterPlan, TLoraConfig, attach, calibrate, get_tlora_model, plan
from tlora.adapter.blocks import plan_in_blocks
from tlora.adapter.freeze import FrozenACallback, lora_layers
from tlora.adapter.solve import solve
from tlora.calibration.weights import dense_weight
from tlora.errors import DivergenceError, TLoraError
from tlora.training.divergence import DivergenceCallback

Dealt = list[list[list[int]]]
"""By process: its batches, each the numbers of its samples."""


def load(folder: str) -> Any:
    """Load a causal model without a word."""
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def sharded(model: Any) -> Any:
    """Shard the way of the tutorials: every layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_decoder().layers:
        fully_shard(layer)
    return fully_shard(model)


def wrapped(folder: str, engine: str) -> Any:
    model = load(folder)
    if engine == "fsdp":
        return sharded(model)
    return nn.parallel.DistributedDataParallel(model) if engine == "ddp" else model


def batches(dealt: Dealt, bad: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Return this process's batches; the labels of ``bad`` samples are all masked."""
    samples = causal_samples()
    for number in bad:
        samples[number]["labels"] = torch.full_like(samples[number]["labels"], -100)
    return [padded([samples[i] for i in batch]) for batch in dealt[dist.get_rank()]]


def state(model: nn.Module) -> dict[str, Any]:
    """Kind, gradient, mode and bits of everything, as this process has it."""
    seen: dict[str, Any] = {}
    for name, value in model.named_parameters():
        local = value.to_local() if hasattr(value, "to_local") else value
        seen[name] = (type(value).__name__, value.requires_grad, local.detach().clone())
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        seen[f"{name}()"] = (module.training, hooks, None)
    return seen


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    for name, (*marks, value) in before.items():
        assert marks == list(after[name][:2]), name
        assert value is None or torch.equal(value, after[name][2]), name


def measure(folder: str, engine: str, dealt: Dealt, fields: dict[str, Any], out: str) -> None:
    """Calibrate and plan; leave both in a file of this process."""
    model = wrapped(folder, engine).train()
    before = state(model)
    config = TLoraConfig(**fields)
    stats = calibrate(model, batches(dealt), config)
    assert_unchanged(before, state(model))
    # A pass of the user's own leaves the weights of FSDP2's root gathered.
    model(**padded(causal_samples()))
    found = plan(model, stats, config)
    stats.save(Path(out) / f"stats-{dist.get_rank()}.safetensors")
    found.save(Path(out) / f"plan-{dist.get_rank()}.safetensors")


def planned(folder: str, engine: str, dealt: Dealt, fields: dict[str, Any], out: str) -> int:
    """Calibrate and plan in one go; return the passes that took."""
    model = wrapped(folder, engine)
    before = state(model)
    found = plan_in_blocks(model, batches(dealt), TLoraConfig(**fields))
    assert_unchanged(before, state(model))
    found.save(Path(out) / f"plan-{dist.get_rank()}.safetensors")
    return found.info["passes"]


def solved(folder: str, dealt: Dealt) -> tuple[list[str], list[int]]:
    """Plan a sharded model; return what was solved here, and how many weights lived at each."""
    import weakref

    from tlora.adapter import planning

    config = TLoraConfig(r=2)
    model = wrapped(folder, "fsdp")
    stats = calibrate(model, batches(dealt), config)
    gathered: list[Any] = []
    here: list[str] = []
    alive: list[int] = []

    def gather(target: Any) -> Any:
        weight = dense_weight(target)
        gathered.append(weakref.ref(weight))
        return weight

    def note(jobs: Any, *rest: Any) -> Any:
        here.extend(job.target.name for job in jobs)
        alive.append(sum(each() is not None for each in gathered))
        return solve(jobs, *rest)

    try:
        planning.dense_weight, planning.solve = gather, note
        plan(model, stats, config)
    finally:
        planning.dense_weight, planning.solve = dense_weight, solve
    assert len(gathered) == len(stats.modules)
    return here, alive


def failure(folder: str, engine: str, dealt: Dealt, bad: tuple[int, ...]) -> tuple[str, str]:
    """Calibrate on bad samples; return the error's class and words. The model must live on."""
    model = wrapped(folder, engine)
    before = state(model)
    try:
        calibrate(model, batches(dealt, bad), TLoraConfig(r=2))
    except TLoraError as error:
        assert_unchanged(before, state(model))
        good = calibrate(model, batches(dealt), TLoraConfig(r=2))
        assert good.samples == 5
        return type(error).__name__, str(error)
    return "none", ""


def broken(folder: str, engine: str, dealt: Dealt) -> str:
    """Iterate over batches that raise on process 1 after the first."""

    def some() -> Any:
        for number, batch in enumerate(batches(dealt)):
            if dist.get_rank() == 1 and number == 1:
                raise OSError("the disk is gone")
            yield batch

    try:
        calibrate(wrapped(folder, engine), some(), TLoraConfig(r=2))
    except TLoraError as error:
        return str(error)
    return "none"


def skipped(folder: str, engine: str, dealt: Dealt, bad: tuple[int, ...], out: str) -> Any:
    """Leave bad samples out; return their numbers."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = calibrate(
            wrapped(folder, engine), batches(dealt, bad), TLoraConfig(r=2), skip_bad_samples=True
        )
    stats.save(Path(out) / f"stats-{dist.get_rank()}.safetensors")
    return sorted(map(int, stats.info["skipped_samples"]))


def cached(folder: str, dealt: Dealt, out: str) -> tuple[str, bool]:
    """Calibrate twice with one cache; return its key, and whether the second run ran nothing."""
    model = load(folder)
    first = calibrate(model, batches(dealt), TLoraConfig(r=2), cache=out)
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(0))
    second = calibrate(model, batches(dealt), TLoraConfig(r=2), cache=out)
    assert first.key is not None
    assert second.key == first.key
    return first.key.data, not calls


def refused(folder: str) -> list[str]:
    """Ask for what cannot be; return the sentences."""
    said = []
    found = AdapterPlan.load(folder + "/plan.safetensors")
    for engine in ("ddp", "fsdp"):
        model = wrapped(folder, engine)
        for ask in (
            lambda model=model: attach(model, found),
            lambda model=model: get_tlora_model(model, found.config, batches([[[0]], [[1]]])),
        ):
            try:
                ask()
            except TLoraError as error:
                said.append(str(error))
    return said


def train(folder: str, engine: str, file: str) -> list[float]:
    """Attach a plan to the plain model, wrap, train two steps; return sums over the adapter."""
    from peft.tuners.lora import LoraLayer

    found = AdapterPlan.load(file)
    model: Any = attach(load(folder), found)
    callback = FrozenACallback()
    if engine == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.base_model.model.get_decoder().layers:
            fully_shard(layer)
        model = fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inner = model.module if engine == "ddp" else model
    callback.on_train_begin(None, None, None, model=inner)
    for _ in range(2):
        model(**batches([[[0, 1]], [[2, 3]]])[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    callback.on_train_end(None, None, None, model=inner)
    sums = []
    for name, layer in lora_layers(inner):
        assert isinstance(layer, LoraLayer)
        matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        a, b = (m.full_tensor() if hasattr(m, "full_tensor") else m for m in matrices)
        short = name.removeprefix("base_model.model.")
        assert torch.equal(a, found.modules[short].lora_A), name
        assert b.abs().max() > 0, name
        sums += [a.sum().item(), b.abs().sum().item()]
    return sums


def zero3(folder: str, dealt: Dealt, out: str) -> list[int]:
    """Calibrate and plan with weights that a stand-in of ZeRO-3 keeps; return what was gathered."""
    import sys

    import zero

    model = load(folder)
    kept = zero.partition(model)
    parts = [parameter.ds_tensor.clone() for parameter in kept]
    before = sys.modules.get("deepspeed")
    sys.modules["deepspeed"] = zero.MODULE
    try:
        config = TLoraConfig(r=2)
        stats = calibrate(model, batches(dealt), config)
        zero.GATHERED.clear()
        found = plan(model, stats, config)
    finally:
        if before is None:
            del sys.modules["deepspeed"]
        else:
            sys.modules["deepspeed"] = before
    del model.ds_inflight_param_registry
    with pytest.raises(TLoraError, match="no engine gathers it"):
        calibrate(model, batches(dealt), config)
    for parameter, part in zip(kept, parts, strict=True):
        assert parameter.ds_status is zero.Status.NOT_AVAILABLE
        assert parameter.numel() == 0
        assert torch.equal(parameter.ds_tensor, part)
    stats.save(Path(out) / f"stats-{dist.get_rank()}.safetensors")
    found.save(Path(out) / f"plan-{dist.get_rank()}.safetensors")
    return zero.GATHERED


def divergence(bad: dict[int, list[float]]) -> tuple[int, int, str]:
    """Return the step at which this process stops, the step that it names, and its error.

    Args:
        bad: losses of each process; all gradient norms are finite.
    """
    own = bad[dist.get_rank()]
    trainer = SimpleNamespace(
        add_callback=lambda _: None,
        training_step=lambda step: torch.tensor(own[step]),
        accelerator=SimpleNamespace(clip_grad_norm_=lambda: torch.tensor(1.0)),
    )
    callback = DivergenceCallback()
    callback.watch(trainer)
    arguments = SimpleNamespace(learning_rate=1.0)
    step, model = 0, nn.Linear(2, 2)
    control = TrainerControl(should_log=True)
    try:
        for step in range(len(own)):
            trainer.training_step(step)
            trainer.accelerator.clip_grad_norm_()
            state = SimpleNamespace(global_step=step + 1)
            callback.on_step_end(arguments, state, control, model)
        callback.on_train_end(arguments, state, control, model)
    except DivergenceError as error:
        return step + 1, error.step, str(error)
    return 0, 0, ""
