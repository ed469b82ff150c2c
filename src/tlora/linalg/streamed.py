"""The subspace of W C when C is too large to store: subspace iteration over the samples.

Each pass over the samples multiplies a d x l block by C exactly, C V = sum_s X_s^T (X_s V) with X_s
centered, in d x l memory. Three passes make one power iteration and a Rayleigh-Ritz step. A
one-pass sketch of C is not accurate enough, because spectra of real activations decay slowly
(docs/method.md, 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tlora.linalg.matrices import FactoredMatrix, full_precision
from tlora.linalg.orthogonal import batch_bytes, batches, orthonormal, read
from tlora.linalg.products import multiplies_narrow, product_of_terms, terms
from tlora.linalg.singular import Solver
from tlora.linalg.subspace import Problem, Subspace, share, task_subspaces

PASSES = 3
_PROBES = 16


def block_width(columns: int, rank: int) -> int:
    """Return l, the columns of the block: 4 r, at least r + 32, and at most d."""
    return min(max(4 * rank, rank + 32), columns)


class StreamedSubspace:
    """Finds the leading right singular vectors of W C using only products with C.

    The caller repeats this `PASSES` times: `product` is zeroed, `add` accumulates C V sample by
    sample,
    and `advance` turns the products of all modules into the next blocks.

    Args:
        columns: d.
        rank: r, at most min(m, d).
        seed: seed of the starting block.
        device: device of the blocks.

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
        """Whether all passes are done."""
        return self._done == PASSES

    @full_precision
    def add(self, centered: Tensor, narrow: bool = False) -> None:
        """Add X^T (X V).

        Args:
            centered: X, tokens x d float32.
            narrow: X is 16-bit numbers minus a mean (`PackedTriangle.add_gram`).
        """
        if narrow and multiplies_narrow(centered.device):
            parts = terms(centered, 2)
            image = terms(product_of_terms(parts, terms(self.block, 2)), 2)
            self.product.add_(product_of_terms([part.T for part in parts], image))
        else:
            self.product.addmm_(centered.T, centered @ self.block)

    def close(self, weight: Callable[[], Tensor]) -> None:
        """End a pass: the product becomes the next block, not yet orthonormal."""
        self._done += 1
        if self.finished:
            return
        towards_weight = self._done % 2 == 1
        if towards_weight:
            dense = weight()
            self.block = dense.T @ (dense @ self.product)
        else:
            self.block = self.product
        del self.product

    def open(self, block: Tensor) -> None:
        """Begin the next pass with an orthonormal block."""
        self.block = block
        if self._done == PASSES - 1:
            probes = self._normal(len(block), _PROBES).to(block)
            probes -= block @ (block.T @ probes)
            self.block = torch.cat([block, probes], dim=1)
        self.product = torch.zeros_like(self.block)

    def _normal(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator)


@full_precision
def advance(spaces: Sequence[StreamedSubspace], weights: Sequence[Callable[[], Tensor]]) -> None:
    """End a pass: treat each product as C V and make the next block.

    Args:
        spaces: spaces after the same number of passes.
        weights: each returns W, m x d; called one at a time, only in the first pass.
    """
    for space, weight in zip(spaces, weights, strict=True):
        space.close(weight)
    going_on = [space for space in spaces if not space.finished]
    sizes = [space.block.nbytes for space in going_on]
    for places in batches(sizes, batch_bytes(going_on[0].block.device) if going_on else 0):
        some = [going_on[place] for place in places]
        for space, block in zip(some, orthonormal([space.block for space in some]), strict=True):
            space.open(block)


@full_precision
def results(
    spaces: Sequence[StreamedSubspace], weights: Sequence[Callable[[], Tensor]]
) -> list[Subspace]:
    """Return the subspaces after the last pass.

    Their captured energy is an estimate: the part of ||W C||_F^2 inside the block is exact, the
    part outside is measured on random probes (Hutch++: Meyer et al. 2021).

    Args:
        spaces: finished spaces.
        weights: each returns W, m x d; called one at a time.
    """
    problems, lost = [], []
    for space, weight in zip(spaces, weights, strict=True):
        image = weight() @ space.product
        kept = FactoredMatrix(image[:, :-_PROBES])
        lost.append(image[:, -_PROBES:].double().square().sum() / _PROBES)
        block = space.block[:, :-_PROBES]
        problems.append(Problem(partial(_unchanged, kept), weight, kept.shape, space.rank, block))
    found = task_subspaces(problems, Solver())
    return [_add_lost(each, outside) for each, outside in zip(found, read(lost), strict=True)]


def _unchanged(product: FactoredMatrix) -> FactoredMatrix:
    return product


def _add_lost(found: Subspace, lost: float) -> Subspace:
    inside = found.total_energy or 0.0
    kept, whole = (found.captured_energy or 0.0) * inside, inside + lost
    return replace(found, captured_energy=share(kept, whole), total_energy=whole, method="streamed")
