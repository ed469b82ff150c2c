"""Second moments of many modules: shared where inputs are shared, kept while they fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from tlora.calibration.hooks import Record
from tlora.linalg.moments import SecondMoment


class Accumulator(Protocol):
    """Takes in what the hooks have recorded of a batch."""

    def update(self, records: Mapping[str, Record], size: int) -> None:
        """Add a batch of ``size`` samples."""
        ...


def moment_bytes(columns: int) -> int:
    """Return the bytes of one float32 second moment of ``columns`` inputs."""
    return 4 * columns**2


class MomentBank:
    """Accumulates the second moments of the targets.

    Modules that read the same tensors in every batch form a group with one second moment.

    Args:
        spared: names of modules whose moments are not kept (a later pass may).
    """

    def __init__(self, spared: Collection[str] = ()) -> None:
        self.spared = frozenset(spared)
        self.group_of: dict[str, int] = {}
        self.moments: dict[int, SecondMoment | None] = {}

    @property
    def bytes(self) -> int:
        """Bytes that the kept moments take."""
        return sum(moment_bytes(m.dim) for m in self.moments.values() if m is not None)

    def moment(self, name: str) -> SecondMoment | None:
        """Return the second moment of a module, None if it is not kept (or was never seen)."""
        return self.moments.get(self.group_of.get(name, -1))

    def update(self, records: Mapping[str, Record], size: int) -> None:
        """Add a batch of ``size`` samples that the hooks have recorded and split."""
        self._group(records)
        done: set[int] = set()
        for name, record in records.items():
            group = self.group_of[name]
            moment = self.moments[group]
            if moment is not None and group not in done:
                done.add(group)
                rows, mask = record.joined(size)
                moment.update(rows.to(moment.scatter.device), mask)

    def _group(self, records: Mapping[str, Record]) -> None:
        """Put modules that read the same tensors into one group.

        Modules of a group that read different tensors in this batch part here, before it is
        added, each with a copy of what they have in common.
        """
        seen: dict[tuple[object, ...], int] = {}
        for name, record in records.items():
            old = self.group_of.get(name)
            # What is kept and what is not never share a group, whatever they read.
            key = (old, record.source, name in self.spared)
            if key not in seen:
                taken = old is None or old in seen.values()
                seen[key] = self._new_group(record, old) if taken else old  # type: ignore[assignment]
            self.group_of[name] = seen[key]

    def _new_group(self, record: Record, old: int | None) -> int:
        group = len(self.moments)
        if old is None:
            self.moments[group] = self._new_moment(record)
        else:
            common = self.moments[old]
            self.moments[group] = None if common is None else common.clone()
        return group

    def _new_moment(self, record: Record) -> SecondMoment | None:
        target = record.target
        if target.name in self.spared:
            return None
        device: torch.device = next(target.module.parameters()).device
        return SecondMoment(target.d_in, device=device)
