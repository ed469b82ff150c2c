"""Running a method in the contract tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from support import Sample
from tlora.methods.base import Prepared, Traits
from tlora.registry import METHODS

KINDS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}
RUNS = [(name, "llama") for name in METHODS.names()]
"""Every method on a decoder, and one of each kind on an encoder with a new head."""
RUNS += [(name, "bert") for name in ("tlora", "full", "adalora", "pissa", "eva", "houlsby")]
PUBLIC_RUNS = [(name, kind) for name, kind in RUNS if METHODS.load(name).traits.leaves != "own"]
"""Those whose result others read."""
LENGTHS = (9, 8, 10, 7, 12, 6)
STEPS = 10


@dataclass
class Ran:
    """What a method did to a model."""

    method: Any
    options: Any
    prepared: Prepared
    base: Any
    """The same base model, untouched."""
    at_start: dict[str, Tensor]
    """The state of the prepared model."""
    start: Tensor
    """Logits before the first step."""
    trains: dict[str, int]
    """Numbers in each parameter that required a gradient then."""
    with_gradient: set[str]
    """Names of the parameters that a backward pass gave one."""
    leftovers: list[str]
    """Hooks and gradients that were on the model when it was prepared."""
    losses: list[float]
    trained: Tensor
    """Logits after ten steps."""
    folder: Path

    @property
    def traits(self) -> Traits:
        return self.method.traits


def small_options(method: Any, task_type: str, **fields: Any) -> Any:
    """Options for models of width 16."""
    known = {field.name for field in dataclasses.fields(method.options)}
    small = {"r": 2, "init_r": 4, "target_r": 2, "rho": 1.5, "group_size": 4, "length": 2}
    return method.options(
        task_type=task_type, **{k: v for k, v in small.items() if k in known} | fields
    )


def prepare(name: str, model: Any, options: Any, batches: Any, plan: Any = None) -> Prepared:
    torch.manual_seed(5)
    return METHODS.load(name)().prepare(model, options, batches, plan)


def inputs(batch: Sample) -> Sample:
    return {key: value for key, value in batch.items() if key != "labels"}


def logits(model: Any, batch: Sample) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(batch)).logits


def train(prepared: Prepared, batch: Sample, folder: Path) -> list[float]:
    """Ten steps of transformers' own trainer on one batch; return the losses."""
    rows = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    extra = dict(prepared.trainer_kwargs)
    if prepared.optimizer is not None:
        extra["optimizers"] = (prepared.optimizer(prepared.model, arguments), None)
    trainer = transformers.Trainer(
        model=prepared.model,
        args=arguments,
        train_dataset=rows,
        callbacks=prepared.callbacks,
        **extra,
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
