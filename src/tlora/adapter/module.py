"""The plan of one module's adapter. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ModulePlan:
    """The adapter of one module: y = W x + scale * B (lora_A x), B starting at zero.

    Or of a parameter that holds the matrices of E experts: y = W_e x + scale * B_e (A_e x) with
    A_e the rows e r_i to (e + 1) r_i of lora_A.

    Attributes:
        name: the module's (or parameter's) full name in the base model.
        d_in: d, columns of the weight.
        d_out: m, rows of the weight and of B.
        rank: r_i; 0 leaves the module out.
        scale: s_i.
        lora_A: E r_i x d float32; orthonormal rows (of each expert) unless whitened or random.
        captured_energy: share of ||M||_F^2 (of all experts together) that the row space of lora_A
            keeps, M = W C or the matrix of another basis (docs/method.md, 9); None for a random
            basis where no second moment was measured.
        sensitivity: S_i by the configuration's rule, or None where it was not measured.
        solver: how the subspace was found: "exact", "randomized", "streamed", "random", or "none"
            at rank 0.
        experts: E; 1 for a module.
        total_energy: ||M||_F^2, of which captured_energy is a share.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    lora_A: Tensor = field(repr=False)
    captured_energy: float | None
    sensitivity: float | None
    solver: str
    experts: int = 1
    total_energy: float | None = None

    def parameters(self, freeze_a: bool) -> int:
        """Return how many parameters train: E m r_i, and E d r_i more unless A is frozen."""
        return self.experts * self.rank * (self.d_out + (0 if freeze_a else self.d_in))
