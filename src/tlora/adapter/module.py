"""The plan of one module's adapter. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ModulePlan:
    """The adapter of one module: y = W x + scale * B (lora_A x), B starting at zero.

    Attributes:
        name: the module's full name in the base model.
        d_in: d, columns of the weight.
        d_out: m, rows of the weight and of B.
        rank: r_i; 0 leaves the module out.
        scale: s_i.
        lora_A: r_i x d float32; orthonormal rows unless whitened or random.
        captured_energy: share of ||W C||_F^2 that the row space of lora_A keeps; None where no
            second moment was measured.
        sensitivity: S_i, or None where none was measured.
        solver: how the subspace was found: "exact", "randomized",
            "streamed", "random",
            or "none" at rank 0.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    lora_A: Tensor
    captured_energy: float | None
    sensitivity: float | None
    solver: str
