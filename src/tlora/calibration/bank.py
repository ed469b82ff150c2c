"""Second moments of many modules, shared where inputs are shared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from tlora.calibration.hooks import Record
from tlora.calibration.offload import device_of
from tlora.calibration.spill import Spill
from tlora.calibration.targets import Target
from tlora.linalg.moments import SecondMoment


class Accumulator(Protocol):
    """Takes in what the hooks have recorded of a batch."""

    def update(self, records: Mapping[str, Record], size: int) -> None:
        """Add a batch of ``size`` samples."""
        ...


def moment_bytes(columns: int) -> int:
    """Return the bytes of one float32 second moment of ``columns`` inputs."""
    return 4 * columns**2


def moment_parts(tensors: Mapping[str, Tensor], group: int | str) -> dict[str, Tensor]:
    """Return the parts of a second moment from tensors that are named "GROUP.PART"."""
    prefix = f"{group}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class MomentBank:
    """Accumulates the second moments of the targets.

    Modules that read the same tensors in every batch form a group with one second moment.

    Args:
        spared: names of modules whose moments are not kept (a later pass may).
        spill: where accumulators come from; None: from memory.
    """

    def __init__(self, spared: Collection[str] = (), spill: Spill | None = None) -> None:
        self.spared = frozenset(spared)
        self.spill = spill
        self.group_of: dict[str, int] = {}
        self.moments: dict[int, SecondMoment | None] = {}
        self._mapped: set[int] = set()

    @property
    def bytes(self) -> int:
        """Bytes of memory that the kept moments take."""
        return sum(
            moment_bytes(moment.dim)
            for group, moment in self.moments.items()
            if moment is not None and group not in self._mapped
        )

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
                # What is mapped comes to the rows instead, block by block.
                if group not in self._mapped:
                    rows = rows.to(moment.device)
                moment.update(rows, mask)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what `restore` takes: tensors, and plain JSON values."""
        tensors: dict[str, Tensor] = {}
        counts = {}
        for group, moment in self.moments.items():
            if moment is not None:
                parts = moment.parts()
                tensors |= {f"{group}.{part}": tensor for part, tensor in parts.items()}
                counts[str(group)] = {"samples": moment.samples, "tokens": moment.tokens}
        return tensors, {"group_of": self.group_of, "counts": counts}

    def restore(
        self, tensors: Mapping[str, Tensor], values: dict[str, Any], targets: Iterable[Target]
    ) -> None:
        """Go on from the `state` of another bank that spares none of the ``targets``."""
        self.group_of = dict(values["group_of"])
        for target in targets:
            group = self.group_of.get(target.name, -1)
            if group >= 0 and group not in self.moments:
                moment = self._new_moment(target, group)
                moment.take(moment_parts(tensors, group), **values["counts"][str(group)])
                self.moments[group] = moment

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
        common = None if old is None else self.moments[old]
        moment = None
        if record.target.name not in self.spared:
            moment = self._new_moment(record.target, group)
            if common is not None:
                moment.take(common.parts(), common.samples, common.tokens)
        self.moments[group] = moment
        return group

    def _new_moment(self, target: Target, group: int) -> SecondMoment:
        device = device_of(target.module)
        if self.spill is None:
            return SecondMoment(target.d_in, device=device)
        scatter, in_memory = self.spill.zeros(target.d_in, device)
        if not in_memory:
            self._mapped.add(group)
        return SecondMoment(target.d_in, scatter=scatter)
