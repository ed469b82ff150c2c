"""Nested LoRA: each training step uses only the first b ranks, so that any number of ranks works.

A and B belong to PEFT; the modules that replace their Linears hold the same parameters under the
same names, so PEFT still handles saving, merging and checkpoints.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tlora.adapter.freeze import lora_layers
from tlora.adapter.saved import LEAST, NESTED
from tlora.adapter.savedconfig import WEIGHTS

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class LeadingRanks:
    """The number of ranks that all layers of a model compute with.

    Attributes:
        count: b; None: all ranks.
        frozen: only rank b gets a gradient.
    """

    count: int | None = None
    frozen: bool = False


class LeadingLinear(nn.Linear):
    """A (``dim`` 0) or B (``dim`` 1) of a LoRA, cut to the current leading ranks."""

    ranks: LeadingRanks
    dim: int

    @classmethod
    def of(cls, plain: nn.Module, ranks: LeadingRanks, dim: int) -> LeadingLinear:
        """Return a module with the weight of ``plain``, a Linear without bias."""
        weight: nn.Parameter = plain.weight  # type: ignore[assignment]
        made = cls(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight, made.ranks, made.dim = weight, ranks, dim
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Return A[:b] x; or (R / b) B[:, :b] z, so that lora_alpha / R becomes lora_alpha / b."""
        count, most = self.ranks.count, self.weight.shape[self.dim]
        if count is None or (count == most and not self.ranks.frozen):
            return super().forward(input)
        weight = self.weight.narrow(self.dim, 0, count)
        if self.ranks.frozen:
            before = weight.narrow(self.dim, 0, count - 1).detach()
            weight = torch.cat([before, weight.narrow(self.dim, count - 1, 1)], dim=self.dim)
        output = nn.functional.linear(input, weight)
        return output * (most / count) if self.dim else output


def make_nested(model: PeftModel, ranks: LeadingRanks) -> None:
    """Let ``ranks`` decide how many leading ranks each LoRA layer of ``model`` computes with."""
    for _, layer in lora_layers(model):
        for held, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
            held["default"] = LeadingLinear.of(held["default"], ranks, dim)


class DrawRank(TrainerCallback):
    """Draws b for each optimizer step, uniform from ``least`` to ``most``.

    Evaluation uses all ranks. A draw depends only on the run's seed and the step number, so a
    resumed run, and every process of a group, draws the same.
    """

    def __init__(self, ranks: LeadingRanks, least: int, most: int) -> None:
        self.ranks, self.least, self.most = ranks, least, most

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw b for a step."""
        drawn = random.Random(f"{args.seed}, {state.global_step}")
        self.ranks.count = drawn.randint(self.least, self.most)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Use all ranks again."""
        self.ranks.count = None


def mark_nested(folder: Path, least: int) -> None:
    """Record in an adapter's weights that its leading ranks, ``least`` or more, are adapters."""
    from safetensors.torch import load_file, save_file

    file = folder / WEIGHTS
    if file.is_file():  # a process of a group may have written nothing
        header = {"format": "pt", NESTED: "true", LEAST: str(least)}
        save_file(load_file(file), file, metadata=header)
