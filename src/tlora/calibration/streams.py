"""Subspaces of modules whose second moment is not to be held, from passes over the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tlora.calibration.hooks import Record
from tlora.calibration.offload import device_of
from tlora.calibration.targets import Target
from tlora.calibration.weights import dense_weight
from tlora.linalg.moments import centred_rows
from tlora.linalg.streamed import StreamedSubspace, block_width
from tlora.linalg.subspace import Subspace


def stream_bytes(columns: int, rank: int) -> int:
    """Return the bytes that one module's subspace iteration takes: two d x l blocks, float32."""
    return 2 * 4 * columns * block_width(columns, rank)


class StreamBank:
    """Subspace iterations of several modules, side by side.

    Args:
        targets: the modules.
        ranks: of each.
        seed: of the starting blocks.
    """

    def __init__(self, targets: Sequence[Target], ranks: Mapping[str, int], seed: int) -> None:
        self.targets = targets
        self.spaces = {
            t.name: StreamedSubspace(t.d_in, ranks[t.name], seed, device=device_of(t.module))
            for t in targets
        }

    @property
    def finished(self) -> bool:
        """Whether all passes are made."""
        return all(space.finished for space in self.spaces.values())

    def update(self, records: Mapping[str, Record], size: int) -> None:
        """Add a batch of ``size`` samples; inputs that modules share are centred once."""
        centred: dict[tuple[object, ...], Tensor] = {}
        for name, record in records.items():
            source = record.source
            if source not in centred:
                rows, mask = record.joined(size)
                centred[source] = centred_rows(rows, mask, torch.float32).centred
            space = self.spaces[name]
            space.add(centred[source].to(space.block.device))

    def advance(self) -> None:
        """End a pass."""
        for target in self.targets:
            self.spaces[target.name].advance(dense_weight(target))

    def result(self, target: Target) -> Subspace:
        """Return a module's subspace after the last pass."""
        return self.spaces[target.name].result(dense_weight(target))
