"""Adapters of other forms inside PEFT's own LoRA layers, saved as plain LoRAs.

PEFT's layer computes s B (A x). A module that computes the same map from other parameters replaces
`lora_A` or `lora_B`; its `weight` is the matrix. So PEFT still handles merging, disabling and
checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tlora.adapter.freeze import freeze_a, lora_layers
from tlora.adapter.stock import save_adapter
from tlora.calibration.weights import Target, dense_weight
from tlora.linalg.matrices import full_precision

if TYPE_CHECKING:
    from peft import PeftModel


_FACTOR = re.compile(r"\.lora_[AB]\.default\.")


class CoreB(nn.Module):
    """Maps z (... x r) to a P Q z (... x m): P is fixed, Q and a train, or a = 1 without a scale.

    Parameter names must not contain "lora_", by which PEFT finds its own.
    """

    def __init__(self, left: Tensor, scale: float | None = None) -> None:
        """Keep ``left``, P (m x r); Q (r x r) starts at zero, a at ``scale``; None: a stays 1."""
        super().__init__()
        rank = left.shape[1]
        self.left: Tensor
        # A buffer: saved with each checkpoint, and never trained by code that switches parameters.
        self.register_buffer("left", left)
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=left.dtype, device=left.device))
        self.scale: nn.Parameter | float = 1.0
        if scale is not None:
            # 1 x 1: PEFT mistakes a matrix of fewer dimensions for a shard that was not gathered.
            self.scale = nn.Parameter(torch.full_like(left[:1, :1], scale))

    @property
    def weight(self) -> Tensor:
        """B = a P Q, m x r: the matrix that PEFT merges."""
        return self.scale * (self.left.to(self.core.dtype) @ self.core)

    def forward(self, z: Tensor) -> Tensor:
        """Return a P Q z; costs r x r more numbers per token than LoRA."""
        mixed = self.scale * nn.functional.linear(z.to(self.core.dtype), self.core)
        return nn.functional.linear(mixed, self.left.to(self.core.dtype))


_TRANSFORMATIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "shim": (1, lambda c: c),
    "icfm": (1, lambda c: c @ c.T),
    "ctcm": (2, torch.matmul),
    "dtsm": (2, torch.add),
}
"""MTLoRA's structures: the number of r x r matrices that T is computed from, and how."""


class TransformedB(nn.Module):
    """Maps z (... x r) to B T z (... x m). B and C (and D), from which T is computed, train."""

    def __init__(self, like: Tensor, structure: str) -> None:
        """Start B at zero and draw C (and D) from torch's global generator, as a Linear's weight.

        Args:
            like: m x r, of the dtype and on the device that all get.
            structure: a key of `_TRANSFORMATIONS`.
        """
        super().__init__()
        rank = like.shape[1]
        count, self._transform = _TRANSFORMATIONS[structure]
        self.up = nn.Parameter(torch.zeros_like(like))
        self._cores = ("core_c", "core_d")[:count]
        for name in self._cores:
            drawn = torch.empty(rank, rank, dtype=like.dtype, device=like.device)
            self.register_parameter(name, nn.Parameter(drawn))
            nn.init.kaiming_uniform_(drawn, a=5**0.5)

    @property
    def transformation(self) -> Tensor:
        """T, r x r."""
        return self._transform(*map(self.get_parameter, self._cores))

    @property
    def weight(self) -> Tensor:
        """B T, m x r: what PEFT merges."""
        return self.up @ self.transformation

    def forward(self, z: Tensor) -> Tensor:
        """Return B T z; its cost is that of a LoRA and of r x r numbers a token more."""
        return nn.functional.linear(nn.functional.linear(z, self.transformation), self.up)


class GroupedA(nn.Module):
    """Maps x (... x d) to A pool(x) (... x r): pool averages each ``size`` neighbors; A trains."""

    def __init__(self, rank: int, groups: int, size: int, like: Tensor) -> None:
        """Draw A (r x groups) from torch's global generator, by Xavier's rule.

        Args:
            rank: r.
            groups: d / size.
            size: inputs per group.
            like: a tensor with the dtype and device of A.
        """
        super().__init__()
        self.size = size
        self.grouped = nn.Parameter(torch.empty(rank, groups, dtype=like.dtype, device=like.device))
        nn.init.xavier_uniform_(self.grouped)

    @property
    def weight(self) -> Tensor:
        """The matrix of the whole map, r x d: the matrix that PEFT merges."""
        return self.grouped.repeat_interleave(self.size, dim=1) / self.size

    def forward(self, x: Tensor) -> Tensor:
        """Return A pool(x)."""
        pooled = x.unflatten(-1, (-1, self.size)).mean(dim=-1)
        return nn.functional.linear(pooled, self.grouped)


def make_trimatrix(model: PeftModel, scale: float) -> None:
    """Turn LoRA layers wrapped by PEFT into tri-matrix adapters.

    R is PEFT's random A; P is drawn here from torch's global generator, like a Linear's weight.

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


@full_precision
def make_core(model: PeftModel, targets: Sequence[Target], sigma: float) -> None:
    """Put a trained core between singular factors of W, as EDoRA does in DoRA, LoRA-XS in LoRA.

    R = S_r V_r^T and P = U_r of W = U S V^T; Q is drawn from torch's global generator.

    Args:
        model: freshly wrapped, so that DoRA's magnitudes are those of W.
        targets: the modules before wrapping.
        sigma: standard deviation of the entries of Q before training.
    """
    for target in targets:
        layer: Any = model.base_model.model.get_submodule(target.name)
        right = layer.lora_A["default"].weight
        rank = len(right)
        u, s, vh = torch.linalg.svd(dense_weight(target), full_matrices=False)
        core = CoreB(u[:, :rank].to(right).contiguous())
        with torch.no_grad():
            right.copy_(s[:rank, None] * vh[:rank])
            core.core.normal_(std=sigma)
        layer.lora_B["default"] = core
    freeze_a(model)


def make_grouped(model: PeftModel, size: int) -> None:
    """Turn LoRA layers wrapped by PEFT into ones whose A reads means of ``size`` inputs."""
    for _, layer in lora_layers(model):
        plain = layer.lora_A["default"].weight
        rank, width = plain.shape
        layer.lora_A["default"] = GroupedA(rank, width // size, size, plain)


def make_transformed(model: PeftModel, structure: str) -> None:
    """Turn a model wrapped by PEFT's LoRA into MTLoRA's: T stands between A and B, all train."""
    for _, layer in lora_layers(model):
        plain = layer.lora_B["default"].weight.detach()
        layer.lora_B["default"] = TransformedB(plain, structure)


def written_out(
    model: PeftModel, matrix: Callable[[Any], Tensor] = attrgetter("weight")
) -> dict[str, Tensor]:
    """Return the state of a plain LoRA: the ``matrix`` of each replacement of A and B."""
    whole = model.state_dict()
    state = {key: value for key, value in whole.items() if not _FACTOR.search(key)}
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            held = matrix(getattr(layer, part)["default"])
            state[f"{name}.{part}.default.weight"] = held.detach().contiguous()
    return state


def save_written_out(model: PeftModel, folder: Path) -> None:
    """Write a plain LoRA: the `weight` of whatever replaces A and B."""
    save_adapter(model, folder, written_out(model))
