"""Subspaces of modules without stored second moments, from passes over the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tlora.calibration.group import ProcessGroup
from tlora.calibration.hooks import ModuleRecord, RealTokens
from tlora.calibration.placement import device_of
from tlora.calibration.weights import Target, dense_weight
from tlora.linalg.moments import centered_rows
from tlora.linalg.products import NARROW
from tlora.linalg.streamed import StreamedSubspace, advance, block_width, results
from tlora.linalg.subspace import Subspace


def stream_bytes(columns: int, rank: int) -> int:
    """Return the bytes of one module's subspace iteration: two d x l float32 blocks."""
    return 2 * 4 * columns * block_width(columns, rank)


class StreamAccumulator:
    """Subspace iterations of several modules, side by side.

    Args:
        targets: the modules.
        ranks: rank of each.
        seed: seed of the starting blocks.
    """

    def __init__(self, targets: Sequence[Target], ranks: Mapping[str, int], seed: int) -> None:
        self.targets = targets
        self.spaces = {
            t.name: StreamedSubspace(t.d_in, ranks[t.name], seed, device=device_of(t.module))
            for t in targets
        }

    @property
    def finished(self) -> bool:
        """Whether all passes are done."""
        return all(space.finished for space in self.spaces.values())

    def prepare(self, records: Mapping[str, ModuleRecord]) -> None:
        """Keep only the inputs of a batch."""

    def update(self, records: Mapping[str, ModuleRecord], size: int) -> None:
        """Add a batch of ``size`` samples; inputs that modules share are centered once."""
        readers: dict[tuple[object, ...], list[str]] = {}
        for name, record in records.items():
            readers.setdefault(record.source, []).append(name)
        tokens = RealTokens()
        for names in readers.values():
            rows, mask = records[names[0]].joined(size)
            narrow = rows.dtype in NARROW
            centered = centered_rows(rows, mask, torch.float32, tokens.places(mask)).centered
            for space in map(self.spaces.__getitem__, names):
                space.add(centered.to(space.block.device), narrow)

    def pool(self, targets: Sequence[Target], group: ProcessGroup) -> None:
        """Sum the products with C over all processes; each process gets the sum."""
        for target in targets:
            space = self.spaces[target.name]
            space.product = group.all_reduce_sum(space.product)

    def advance(self, group: ProcessGroup) -> None:
        """End a pass. Every process continues with the first one's blocks, bit for bit."""
        spaces = [self.spaces[target.name] for target in self.targets]
        advance(spaces, [partial(dense_weight, target) for target in self.targets])
        for space in spaces:
            space.block = group.broadcast_tensor(0, space.block)

    def results(self, targets: Sequence[Target], weight: Tensor | None = None) -> list[Subspace]:
        """Return modules' subspaces after the last pass; ``weight``: W of a single module."""
        weights = [partial(given_or_read, weight, target) for target in targets]
        return results([self.spaces[target.name] for target in targets], weights)


def given_or_read(weight: Tensor | None, target: Target) -> Tensor:
    """Return W of a target: as given, otherwise read by `dense_weight`."""
    return dense_weight(target) if weight is None else weight
