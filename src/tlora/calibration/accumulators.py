"""Sums over samples: second moments of inputs, shared between modules, and gradients.

The mean gradient G = (1/n) sum_s dL_s/dW takes m x d numbers per module; the gradient-weighted
second moment N = (1/n) sum_s sum_t ||delta_t||^2 x_t x_t^T takes d x d. Modules that read the same
tensor cannot share either. Both stay in memory from the first batch to the last (docs/method.md,
9).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tlora.calibration.group import ProcessGroup
from tlora.calibration.hooks import ModuleRecord, RealTokens
from tlora.calibration.placement import device_of
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.weights import Target
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError
from tlora.linalg.crossmoment import CrossMoment
from tlora.linalg.gradients import Pairs, add_gradient, gradient_weighted
from tlora.linalg.moments import SecondMoment
from tlora.linalg.packed import packed_numbers


class Accumulator(Protocol):
    """Consumes the hooks' records of each batch."""

    def prepare(self, records: Mapping[str, ModuleRecord]) -> None:
        """Tell the records of a batch what to keep, before the batch runs."""
        ...

    def update(self, records: Mapping[str, ModuleRecord], size: int) -> None:
        """Add a batch of ``size`` samples."""
        ...

    def pool(self, targets: Sequence[Target], group: ProcessGroup) -> None:
        """Sum the accumulators over all processes; each process gets the sum."""
        ...


def moment_bytes(columns: int) -> int:
    """Return the bytes of one packed float32 second moment of ``columns`` inputs."""
    return 4 * packed_numbers(columns)


class MomentAccumulator:
    """Accumulates the second moments of the targets.

    Modules that read the same tensors in every batch form a group with one second moment.

    Args:
        excluded: names of modules whose moments are not kept (a later pass may keep them).
        by_outputs: names of modules that need W C but not C: W C is computed from their outputs
            (`CrossMoment`) if no other target reads their input. Such moments cannot be pooled.
    """

    def __init__(self, excluded: Collection[str] = (), by_outputs: Collection[str] = ()) -> None:
        self.excluded = frozenset(excluded)
        self.by_outputs = frozenset(by_outputs) - self.excluded
        self.moment_ids: dict[str, int] = {}
        self.moments: dict[int, SecondMoment | CrossMoment | None] = {}

    def moment(self, name: str) -> SecondMoment | CrossMoment | None:
        """Return the second moment of a module; None if it is not kept or was never seen."""
        return self.moments.get(self.moment_ids.get(name, -1))

    def prepare(self, records: Mapping[str, ModuleRecord]) -> None:
        """Keep the outputs of modules whose W C may come from them."""
        for name in self.by_outputs & records.keys():
            first = name not in self.moment_ids
            records[name].keeps_outputs = first or isinstance(self.moment(name), CrossMoment)

    def update(self, records: Mapping[str, ModuleRecord], size: int) -> None:
        """Add a batch of ``size`` samples that the hooks have recorded and split."""
        self._assign(records)
        done: set[int] = set()
        tokens = RealTokens()
        for name, record in records.items():
            moment_id = self.moment_ids[name]
            moment = self.moments[moment_id]
            if moment is not None and moment_id not in done:
                done.add(moment_id)
                rows, mask = record.joined(size)
                places = tokens.places(mask)
                if isinstance(moment, CrossMoment):
                    moment.update(rows, record.joined_outputs(size), mask, places)
                else:
                    moment.update(rows.to(moment.device), mask, places)

    def pool(self, targets: Sequence[Target], group: ProcessGroup) -> None:
        """Sum the second moments over all processes; each process gets the sum.

        Modules that read the same tensors on every process stay in one group: the common refinement
        of the groups on each process. A process without samples accepts any grouping.
        """
        if group.size == 1:
            return
        seen = [ids for ids in group.all_gather(self.moment_ids) if ids]
        first: dict[tuple[int, ...], Target] = {}
        keys: dict[str, tuple[int, ...]] = {}
        for target in targets if seen else ():
            key = keys[target.name] = tuple(ids[target.name] for ids in seen)
            first.setdefault(key, target)
        uses = Counter(self.moment_ids.get(target.name, -1) for target in first.values())
        moments: dict[int, SecondMoment | CrossMoment | None] = {}
        for number, target in enumerate(first.values()):
            moments[number] = None
            if target.name not in self.excluded:
                own = self.moment(target.name) or new_moment(target)
                moments[number] = sum_over(group, own)  # type: ignore[arg-type]
            old = self.moment_ids.get(target.name, -1)
            uses[old] -= 1
            if not uses[old]:
                self.moments.pop(old, None)  # before the next sum is made
        self.moments = moments
        self.moment_ids = {name: list(first).index(key) for name, key in keys.items()}

    def _assign(self, records: Mapping[str, ModuleRecord]) -> None:
        """Put modules that read the same tensors into one group.

        Modules of a group that read different tensors in this batch are split before the batch is
        added; each gets a copy of the common moment.
        """
        seen: dict[tuple[object, ...], int] = {}
        readers = Counter(record.source for record in records.values())
        for name, record in records.items():
            old = self.moment_ids.get(name)
            # Kept and excluded modules never share a group.
            key = (old, record.source, name in self.excluded)
            if key not in seen:
                taken = old is None or old in seen.values()
                alone = readers[record.source] == 1
                seen[key] = self._new_id(record, old, alone) if taken else old  # type: ignore[assignment]
            self.moment_ids[name] = seen[key]

    def _new_id(self, record: ModuleRecord, old: int | None, alone: bool) -> int:
        moment_id = len(self.moments)
        common = None if old is None else self.moments[old]
        target = record.target
        moment: SecondMoment | CrossMoment | None = None
        if old is None and alone and target.name in self.by_outputs and _in_float32(record):
            moment = CrossMoment(target.d_out, target.d_in)
        elif target.name not in self.excluded:
            # Modules that shared a moment are being split; a `CrossMoment` is never shared.
            moment = new_moment(target, common)  # type: ignore[arg-type]
        self.moments[moment_id] = moment
        return moment_id


def cheaper_by_outputs(targets: Iterable[Target], config: TLoraConfig) -> list[str]:
    """Return the targets that need only W C and get it more cheaply from their outputs.

    Applies only to plain float32 layers on the CPU: outputs rounded to 16 bits are off by 2e-3,
    those of TF32
    products by 5e-4.
    """
    if config.basis != "weight-covariance" or config.whiten:
        return []
    if torch.get_float32_matmul_precision() != "highest":
        return []
    return [
        target.name
        for target in targets
        if target.part is None
        and type(target.module) in (nn.Linear, Conv1D)
        and target.module.weight.dtype == torch.float32
        and target.module.weight.device.type == "cpu"
        and 2 * target.d_out <= target.d_in
    ]


def _in_float32(record: ModuleRecord) -> bool:
    """Return whether a module ran and returned float32 (under autocast it does not)."""
    results = [call.result for call in record.calls]
    return bool(results) and all(r is not None and r[0].dtype == torch.float32 for r in results)


def new_moment(target: Target, start: SecondMoment | None = None) -> SecondMoment:
    """Return a second moment for a target: empty, or a copy of ``start``."""
    device = device_of(target.module)
    if device.type == "cpu":
        # One buffer for the rows and then for C: unwritten pages take no memory, and separate rows
        # would leave holes when C replaces them.
        moment = SecondMoment(target.d_in, space=torch.zeros(packed_numbers(target.d_in)))
    else:
        moment = SecondMoment(target.d_in, device=device)
    if start is not None:
        moment.take(start.parts(), start.samples, start.tokens)
    return moment


def sum_over(group: ProcessGroup, moment: SecondMoment) -> SecondMoment:
    """Return the second moment over all processes' samples."""
    own = moment.weighted_means
    told = group.all_gather((moment.samples, moment.tokens, moment.rows is None, len(own)))
    samples, tokens, formed, held = zip(*told, strict=True)
    parts = {"means": group.all_gather_rows(own, held)}
    if (
        not any(formed)
        and sum(tokens) * moment.dim <= packed_numbers(moment.dim)
        and moment.rows is not None
    ):
        parts["rows"] = group.all_gather_rows(moment.rows, tokens)
    else:
        parts["scatter"] = group.all_reduce_sum(moment.scatter.numbers)
    return SecondMoment.from_parts(parts, sum(samples), sum(tokens))


class GradientAccumulator:
    """Accumulates mean gradients and gradient-weighted second moments of the targets.

    Args:
        config: selects mean gradients, second moments, or both.
        kept: names of the targets to accumulate; None: all.
    """

    def __init__(self, config: TLoraConfig, kept: Collection[str] | None = None) -> None:
        self.means = config.needs_gradient
        self.weighted = config.needs_gradient_moment
        self.kept = None if kept is None else frozenset(kept)
        self.totals: dict[str, Tensor] = {}
        self.moments: dict[str, SecondMoment] = {}

    def keeps(self, target: Target) -> bool:
        """Return whether a target's gradients are accumulated."""
        return self.kept is None or target.name in self.kept

    def update(self, target: Target, samples: Sequence[Pairs], factors: Sequence[float]) -> None:
        """Add a batch.

        Args:
            target: the module.
            samples: the pairs (delta, x) of each sample; at least one sample must have a pair.
            factors: see `SensitivityPass`.
        """
        if not self.keeps(target):
            return
        if self.means:
            add_gradient(self._total(target), samples, factors)
        if self.weighted:
            moment = self._moment(target)
            moment.add_rows(gradient_weighted(samples, factors).to(moment.device))

    def give(self, target: Target, to: ModuleStatistics) -> None:
        """Move G and N, where requested, to a target's statistics.

        G (m x d float32) reuses the sum's memory. Both are zero if the loss does not depend on the
        module.

        Raises:
            CalibrationError: G or N is not finite.
        """
        if not self.keeps(target):
            return
        if self.means:
            to.gradient = self._total(target).div_(to.samples)
            del self.totals[target.name]
            _refuse_overflow(to.gradient, f"{target.name}: its mean gradient")
        if self.weighted:
            moment = to.gradient_moment = self._moment(target)
            moment.samples = to.samples
            kept = moment.scatter.diagonal() if moment.rows is None else moment.rows
            _refuse_overflow(kept, f"{target.name}: its gradient-weighted second moment")
            del self.moments[target.name]

    def pool(self, targets: Iterable[Target], group: ProcessGroup) -> None:
        """Sum the accumulators over all processes; each process gets the sum."""
        if group.size == 1:
            return
        kept = [target for target in targets if self.keeps(target)]
        seen = [target.name in self.totals or target.name in self.moments for target in kept]
        for target, anywhere in zip(kept, group.all_reduce_max(seen), strict=True):
            if anywhere and self.means:
                self.totals[target.name] = group.all_reduce_sum(self._total(target))
            if anywhere and self.weighted:
                self.moments[target.name] = sum_over(group, self._moment(target))

    def _total(self, target: Target) -> Tensor:
        if target.name not in self.totals:
            shape, device = (target.d_out, target.d_in), device_of(target.module)
            self.totals[target.name] = torch.zeros(shape, device=device)
        return self.totals[target.name]

    def _moment(self, target: Target) -> SecondMoment:
        if target.name not in self.moments:
            self.moments[target.name] = new_moment(target)
        return self.moments[target.name]


def _refuse_overflow(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise CalibrationError(
            f"{what} overflows, though the gradient of every sample is finite; calibrate in"
            " float32 or bfloat16."
        )
