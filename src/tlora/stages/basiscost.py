"""What bases beside the paper's take: arithmetic on shapes. Symbols and units as in `estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tlora.adapter.strategy import gradient_bytes
from tlora.config import Basis, TLoraConfig

if TYPE_CHECKING:
    from tlora.stages.estimate import ModuleShape

_SQUARE: tuple[Basis, ...] = ("covariance", "gradient-moment")  # their matrix is d x d
_ROOTS: tuple[Basis, ...] = ("weight-half-covariance",)


def accumulates(config: TLoraConfig) -> bool:
    """Return whether gradients are accumulated, and so each block has a backward pass."""
    return config.needs_gradient or config.needs_gradient_moment


def accumulated_bytes(modules: Sequence[ModuleShape], config: TLoraConfig) -> int:
    """Bytes of G, 4 m d, and N, 4 d^2, of all modules."""
    return sum(gradient_bytes(m.d_out, m.d_in, config) for m in modules)


def gradient_row_bytes(modules: Sequence[ModuleShape], config: TLoraConfig) -> int:
    """Bytes while a batch is accumulated: delta and x in float32, and x weighted for N."""
    if not accumulates(config):
        return 0
    weighted = 1 if config.needs_gradient_moment else 0
    return max((4 * m.rows * (m.d_out + (1 + weighted) * m.d_in) for m in modules), default=0)


def gradient_flops(modules: Sequence[ModuleShape], config: TLoraConfig) -> int:
    """FLOPs of a batch: delta^T X, 2 rows m d; N, rows d^2 (half of a full product)."""
    means = sum(2 * m.rows * m.d_in * m.d_out for m in modules) if config.needs_gradient else 0
    weighted = sum(m.rows * m.d_in**2 for m in modules) if config.needs_gradient_moment else 0
    return means + weighted


def solved(module: ModuleShape, config: TLoraConfig) -> ModuleShape:
    """Return the module with the rows of the matrix that is decomposed: W's, or d."""
    return replace(module, d_out=module.d_in) if config.basis in _SQUARE else module


def root_bytes(module: ModuleShape, config: TLoraConfig) -> int:
    """Bytes of C^(1/2): C, its eigenvectors and a workspace of as much."""
    return 3 * 4 * module.d_in**2 if config.basis in _ROOTS else 0


def root_flops(module: ModuleShape, config: TLoraConfig) -> int:
    """FLOPs of the eigenvectors of C: 9 d^3 (Golub and Van Loan, symmetric QR)."""
    return 9 * module.d_in**3 if config.basis in _ROOTS else 0
