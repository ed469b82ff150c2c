"""Second moments of many modules, shared where inputs are shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tlora.calibration.distributed import Cohort
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

    def pool(self, targets: Sequence[Target], ranks: Cohort) -> None:
        """Add up what all ranks have taken in, so that each holds the sum."""
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

    def pool(self, targets: Sequence[Target], ranks: Cohort) -> None:
        """Add up the second moments of all ranks' samples, so that each rank holds the sum.

        Modules that read the same tensors on every rank stay in one group: the common refinement
        of what the ranks saw. A rank without samples agrees to any.
        """
        if ranks.size == 1:
            return
        seen = [groups for groups in ranks.gather(self.group_of) if groups]
        # Numbers that no rank has used, so that they are the same on all.
        [start] = ranks.highest([len(self.moments)])
        numbers: dict[tuple[int, ...], int] = {}
        group_of: dict[str, int] = {}
        first: dict[int, Target] = {}
        for target in targets if seen else ():
            key = tuple(groups[target.name] for groups in seen)
            group = group_of[target.name] = numbers.setdefault(key, start + len(numbers))
            first.setdefault(group, target)
        uses = Counter(self.group_of.get(target.name) for target in first.values())
        for group, target in first.items():
            old = self.group_of.get(target.name)
            uses[old] -= 1
            spared = target.name in self.spared
            own = None if spared else self._taken_over(target, group, last=not uses[old])
            self.moments[group] = own and sum_over(ranks, own)
        self.group_of = group_of
        self.moments = {group: self.moments[group] for group in first}

    def _taken_over(self, target: Target, group: int, last: bool) -> SecondMoment:
        """Return a moment for a new group: the old group's own, if this is the ``last`` use."""
        old = self.group_of.get(target.name, -1)
        moment = self.moments.get(old)
        if moment is None:
            return self._new_moment(target, group)
        if not last:
            copy = self._new_moment(target, group)
            copy.take(moment.parts(), moment.samples, moment.tokens)
            return copy
        if old in self._mapped:
            self._mapped.add(group)
        return moment

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
        moment, in_memory = new_moment(target, self.spill)
        if not in_memory:
            self._mapped.add(group)
        return moment


def new_moment(target: Target, spill: Spill | None) -> tuple[SecondMoment, bool]:
    """Return an empty second moment for a target, and whether it is in memory."""
    device = device_of(target.module)
    if spill is None and device.type == "cpu":
        # One place for rows and then C: pages that are not written take no memory, and rows
        # that go when C comes would leave holes between what a pass keeps.
        return SecondMoment(target.d_in, scatter=torch.zeros(target.d_in, target.d_in)), True
    if spill is None:
        return SecondMoment(target.d_in, device=device), True
    scatter, in_memory = spill.zeros(target.d_in, device)
    return SecondMoment(target.d_in, scatter=scatter), in_memory


def sum_over(ranks: Cohort, moment: SecondMoment) -> SecondMoment:
    """Return the second moment over all ranks' samples, in the place of this rank's."""
    own = moment.weighted_means
    told = ranks.gather((moment.samples, moment.tokens, moment.rows is None, len(own)))
    samples, tokens, formed, held = zip(*told, strict=True)
    means = ranks.stacked(own, held)
    if not any(formed) and sum(tokens) <= moment.dim and moment.rows is not None:
        rows = ranks.stacked(moment.rows, tokens)
        others = {
            "means": _without(means, held, ranks.rank),
            "rows": _without(rows, tokens, ranks.rank),
        }
        counts = (sum(samples) - moment.samples, sum(tokens) - moment.tokens)
        moment.merge(SecondMoment.from_parts(others, *counts))
        return moment
    # In place: where it is mapped to a file, it stays so.
    scatter = moment.scatter
    scatter.copy_(ranks.add(scatter))
    parts = {"means": means, "scatter": scatter}
    return SecondMoment.from_parts(parts, sum(samples), sum(tokens))


def _without(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    before = sum(counts[:rank])
    return torch.cat([rows[:before], rows[before + counts[rank] :]])
