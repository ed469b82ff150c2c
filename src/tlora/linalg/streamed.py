"""The subspace of W C where C is too large to hold: subspace iteration over the samples.

Each pass over the samples multiplies a d x l block by C exactly, C V = sum_s X_s^T (X_s V) with
X_s centered, in d x l memory. Three passes make one power iteration and a Rayleigh-Ritz step. A
one-pass sketch of C is not good enough: spectra of real activations are not steep (docs/method.md,
3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tlora.linalg.matrices import full_precision
from tlora.linalg.subspace import (
    Solver,
    Subspace,
    completed,
    fix_signs,
    right_singular_vectors,
    rounding,
)

PASSES = 3
_PROBES = 16


def block_width(columns: int, rank: int) -> int:
    """Return l, the columns of the block: 4 r, at least r + 32, and at most d."""
    return min(max(4 * rank, rank + 32), columns)


class StreamedSubspace:
    """Finds the leading right singular vectors of W C from products with C alone.

    The caller repeats, `PASSES` times: `product` is zeroed, C V is added into it sample by sample
    by `add`, and `advance` turns it into the next block.

    Args:
        columns: d.
        rank: r, at most min(m, d).
        seed: of the starting block.
        device: of the blocks.

    Attributes:
        block: V, d x l float32 (`block_width`), with probe columns in the last pass.
    """

    def __init__(
        self,
        columns: int,
        rank: int,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.rank = rank
        self._generator = torch.Generator().manual_seed(seed)
        self.block = self._normal(columns, block_width(columns, rank)).to(device)
        self.product = torch.zeros_like(self.block)
        self._done = 0

    @property
    def finished(self) -> bool:
        """Whether all passes are made."""
        return self._done == PASSES

    @full_precision
    def add(self, centered: Tensor) -> None:
        """Add X^T (X V) for centered rows X, tokens x d float32."""
        self.product.addmm_(centered.T, centered @ self.block)

    @full_precision
    def advance(self, weight: Tensor) -> None:
        """End a pass: take the product for C V and make the next block. ``weight``: W, m x d."""
        self._done += 1
        if self.finished:
            return
        towards_weight = self._done % 2 == 1
        block = weight.T @ (weight @ self.product) if towards_weight else self.product
        self.block = torch.linalg.qr(block).Q
        if self._done == PASSES - 1:
            probes = self._normal(len(block), _PROBES).to(block)
            probes -= self.block @ (self.block.T @ probes)
            self.block = torch.cat([self.block, probes], dim=1)
        self.product = torch.zeros_like(self.block)

    @full_precision
    def result(self, weight: Tensor) -> Subspace:
        """Return the subspace after the last pass.

        Its captured energy is an estimate: what the block keeps of ||W C||_F^2 is exact, what it
        leaves is measured on random probes outside it (Hutch++: Meyer et al. 2021).
        """
        image = weight @ self.product
        kept, lost = image[:, :-_PROBES], image[:, -_PROBES:]
        rotation, values = right_singular_vectors(kept, self.rank, Solver(mode="exact"))
        vectors = fix_signs(rotation @ self.block[:, :-_PROBES].T)
        determined = int((values > values[0] * rounding(kept.shape, values.dtype)).sum())
        vectors = completed(vectors[:determined], weight, self.rank, Solver())
        total = (kept.square().sum() + lost.square().sum() / _PROBES).item()
        energy = 1.0 if total == 0 else min(1.0, values.square().sum().item() / total)
        return Subspace(vectors, energy, "streamed", determined, total)

    def _normal(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator)
