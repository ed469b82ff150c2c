"""Second moments of many modules, shared where inputs are shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tlora.calibration.distributed import Cohort
from tlora.calibration.hooks import Record
from tlora.calibration.offload import device_of
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
    """

    def __init__(self, spared: Collection[str] = ()) -> None:
        self.spared = frozenset(spared)
        self.group_of: dict[str, int] = {}
        self.moments: dict[int, SecondMoment | None] = {}

    @property
    def bytes(self) -> int:
        """Bytes of memory that the kept moments take."""
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
                moment.update(rows.to(moment.device), mask)

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
            own = None if spared else self._taken_over(target, last=not uses[old])
            self.moments[group] = own and sum_over(ranks, own)
        self.group_of = group_of
        self.moments = {group: self.moments[group] for group in first}

    def _taken_over(self, target: Target, last: bool) -> SecondMoment:
        """Return a moment for a new group: the old group's own, if this is the ``last`` use."""
        moment = self.moment(target.name)
        if moment is not None and last:
            return moment
        return new_moment(target, moment)

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
            moment = new_moment(record.target, common)
        self.moments[group] = moment
        return group


def new_moment(target: Target, start: SecondMoment | None = None) -> SecondMoment:
    """Return a second moment for a target: empty, or a copy of ``start``."""
    device = device_of(target.module)
    if device.type == "cpu":
        # One place for rows and then C: pages that are not written take no memory, and rows
        # that go when C comes would leave holes between what a pass keeps.
        moment = SecondMoment(target.d_in, scatter=torch.zeros(target.d_in, target.d_in))
    else:
        moment = SecondMoment(target.d_in, device=device)
    if start is not None:
        moment.take(start.parts(), start.samples, start.tokens)
    return moment


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
    scatter = moment.scatter
    scatter.copy_(ranks.add(scatter))
    parts = {"means": means, "scatter": scatter}
    return SecondMoment.from_parts(parts, sum(samples), sum(tokens))


def _without(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    before = sum(counts[:rank])
    return torch.cat([rows[:before], rows[before + counts[rank] :]])
