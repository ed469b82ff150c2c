"""Tri-matrix adapters: y = W x + a P Q R x inside PEFT's own LoRA layers.

PEFT's layer computes B (A x). R is its `lora_A`, frozen; in the place of its `lora_B` stands a
module that maps z to a P Q z. So merging, disabling and checkpoints stay PEFT's. Written out,
B = a P Q is a plain LoRA's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tlora.adapter.freeze import freeze_a, lora_layers

if TYPE_CHECKING:
    from peft import PeftModel


class CoreB(nn.Module):
    """Maps z (... x r) to a P Q z (... x m): P fixed, Q and a trained.

    Names of the parameters must not contain "lora_", by which PEFT finds its own.
    """

    def __init__(self, left: Tensor, scale: float) -> None:
        """Keep ``left``, P (m x r); Q (r x r) starts at zero, a at ``scale``."""
        super().__init__()
        rank = left.shape[1]
        self.left: Tensor
        # A buffer: saved with each checkpoint, and nothing that switches parameters trains it.
        self.register_buffer("left", left)
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=left.dtype, device=left.device))
        # 1 x 1: PEFT takes a matrix of fewer dimensions for a shard that was not gathered.
        self.scale = nn.Parameter(torch.full_like(left[:1, :1], scale))

    @property
    def weight(self) -> Tensor:
        """B = a P Q, m x r: what PEFT merges."""
        return self.scale * (self.left.to(self.core.dtype) @ self.core)

    def forward(self, z: Tensor) -> Tensor:
        """Return a P Q z; its cost is that of a LoRA and of r x r numbers a token more."""
        mixed = self.scale * nn.functional.linear(z.to(self.core.dtype), self.core)
        return nn.functional.linear(mixed, self.left.to(self.core.dtype))


def make_trimatrix(model: PeftModel, scale: float) -> None:
    """Turn a model wrapped by PEFT's LoRA into one of tri-matrix adapters.

    R is the random A that PEFT drew; P is drawn here from torch's global generator, as torch
    draws a Linear's weight.

    Args:
        model: freshly wrapped; its LoRA scale must be 1 (lora_alpha = r).
        scale: a, before training.
    """
    for _, layer in lora_layers(model):
        plain = layer.lora_B["default"].weight
        left = torch.empty_like(plain)
        nn.init.kaiming_uniform_(left, a=5**0.5)
        layer.lora_B["default"] = CoreB(left.detach(), scale)
    freeze_a(model)


def save_written_out(model: PeftModel, folder: Path) -> None:
    """Write a plain LoRA: lora_A = R, lora_B = a P Q."""
    state = model.state_dict()
    for name, layer in lora_layers(model):
        stem = f"{name}.lora_B.default."
        state = {key: value for key, value in state.items() if not key.startswith(stem)}
        state[f"{stem}weight"] = layer.lora_B["default"].weight.detach()
    model.save_pretrained(folder, state_dict=state)
