"""The purpose of a backward pass, and the statistics computed from each output gradient.

Source: arXiv 2604.18124, section 3 (docs/method.md, 2): S = (1/n) sum_s mean_jk |W (dL_s/dW)|_jk,
the absolute value taken per sample. dL_s/dW = delta_s^T X_s, so no weight needs a gradient.
docs/method.md, 9 describes the other measures and accumulated gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tlora.calibration.accumulators import GradientAccumulator
from tlora.calibration.batches import BadSamples
from tlora.calibration.experts import ExpertsRecord
from tlora.calibration.group import SINGLE_PROCESS, ProcessGroup
from tlora.calibration.hooks import Call, ModuleRecord, RealTokens
from tlora.calibration.weights import Target, is_whole_weight, stored_weight
from tlora.config import TLoraConfig
from tlora.linalg.gradients import Pairs, constant, squared_norm, weighted_magnitude
from tlora.linalg.products import factors as factors_of_product


@dataclass(frozen=True)
class Measure:
    """A number per sample, computed from its gradient of a module's weight.

    Attributes:
        values: takes W (None if not read) and the pairs of each sample, and returns the sum over
            the m d entries.
        power: exponent of the factor that turns the batch's gradient into that of the sample's own
            loss.
        reads_weight: whether W is needed.
        statistic: the attribute of `ModuleStatistics` that holds the mean over samples; None: only
            checks that gradients are finite.
    """

    values: Callable[[Any, Sequence[Pairs]], Tensor]
    power: int
    reads_weight: bool
    statistic: str | None

    def of(self, target: Target, samples: Sequence[Pairs], factors: Sequence[float]) -> Tensor:
        """Return the value of each sample, on the device of the weight or of the pairs."""
        weight = stored_weight(target) if self.reads_weight else None
        values = self.values(weight, samples)
        own = tuple(factor**self.power for factor in factors)
        weights = constant(own, values.dtype, values.device)
        return weights * values / (target.d_out * target.d_in)


def _size(_: Any, samples: Sequence[Pairs]) -> Tensor:
    """Return sum |delta| of each sample; it is finite exactly if every entry is."""
    like = next(delta for pairs in samples for delta, _ in pairs)
    zero = like.new_zeros((), dtype=torch.float32)
    return torch.stack(
        [sum((d.abs().sum(dtype=torch.float32) for d, _ in pairs), start=zero) for pairs in samples]
    )


MAGNITUDE = Measure(weighted_magnitude, 1, True, "sensitivity")

FISHER = Measure(lambda _, samples: squared_norm(samples), 2, False, "fisher")

FINITE = Measure(_size, 1, False, None)


@dataclass(frozen=True)
class Backward:
    """The purpose of a backward pass.

    Attributes:
        measure: computed for each sample and target.
        accumulator: where gradients are accumulated; None: gradients are not needed.
    """

    measure: Measure
    accumulator: GradientAccumulator | None = None

    @property
    def statistic(self) -> str | None:
        """The measured sensitivity, as an attribute of `ModuleStatistics`."""
        return self.measure.statistic


def backward_for(config: TLoraConfig, kept: Collection[str] | None = None) -> Backward | None:
    """Return what a configuration needs from the backward pass; None if nothing.

    Args:
        config: the adapter's configuration.
        kept: names of the targets whose gradients are accumulated; None: all.
    """
    if not config.needs_backward:
        return None
    wanted = {MAGNITUDE: config.needs_sensitivity, FISHER: config.needs_fisher}
    measure = next((each for each, needed in wanted.items() if needed), FINITE)
    needed = config.needs_gradient or config.needs_gradient_moment
    return Backward(measure, GradientAccumulator(config, kept) if needed else None)


def backward_again(config: TLoraConfig) -> Backward | None:
    """Return what the basis needs from a further backward pass.

    It only checks that gradients are finite and measures nothing else. None if no pass is needed.
    """
    if not (config.needs_gradient or config.needs_gradient_moment):
        return None
    return Backward(FINITE, GradientAccumulator(config))


class SensitivityPass:
    """While open, measures each target on every sample.

    A target is processed as soon as the gradients of all its calls have arrived, and then its
    tensors
    are dropped, so neither all gradients nor all inputs are in memory at once.

    Args:
        records: what the forward pass recorded.
        weights: B factors, (labels in the batch) / (labels of s), that turn the gradient of the
            batch's loss at the rows of sample s into the gradient of that sample's own loss.
        asked: what to measure, and where to accumulate gradients.
        group: the processes that hold a part of each weight. If a weight is incomplete when a
            gradient arrives, all processes gather it at the end of the pass.
        late: accumulate gradients only in `accumulate`, once everything is measured; the rows and
            gradients of all calls are kept until then.

    Attributes:
        found: B numbers on the target's device, by target name.
    """

    def __init__(
        self,
        records: Iterable[ModuleRecord],
        weights: Tensor,
        asked: Backward,
        group: ProcessGroup = SINGLE_PROCESS,
        late: bool = False,
    ) -> None:
        self.records = list(records)
        self.weights = weights.tolist()
        self.asked = asked
        self.found: dict[str, Tensor] = {}
        self.group = group
        self.late = late
        self._kept: list[tuple[ModuleRecord, list[Call]]] = []
        self._handles: list[Any] = []
        self._tokens = RealTokens()

    def __enter__(self) -> SensitivityPass:
        for record in self.records:
            for call in record.calls:
                if call.output is not None:
                    hook = partial(self._receive, record, call)
                    self._handles.append(call.output.node.register_prehook(hook))
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is not None:
            return
        # Calls outside the loss's graph never get a gradient; process the others here.
        left = [any(call.delta is not None for call in record.calls) for record in self.records]
        for record, wanted in zip(self.records, self.group.all_reduce_max(left), strict=True):
            if wanted:
                self._add(record)
            record.calls = []

    def accumulate(self) -> None:
        """Accumulate the kept gradients; does nothing unless `late`."""
        if (accumulator := self.asked.accumulator) is not None:
            for record, calls in self._kept:
                for target, samples in _pairs(record, calls, len(self.weights), self._tokens):
                    accumulator.update(target, samples, self.weights)
        self._kept = []

    def _receive(self, record: ModuleRecord, call: Call, deltas: tuple[Tensor | None, ...]) -> None:
        if call.output is not None:
            call.delta = deltas[call.output.output_nr]
        complete = all(other.delta is not None for other in record.calls)
        if complete and (not self._reads_weight or is_whole_weight(record.target.module)):
            self._add(record)

    @property
    def _reads_weight(self) -> bool:
        return self.asked.measure.reads_weight

    def _add(self, record: ModuleRecord) -> None:
        calls = [call for call in record.calls if call.delta is not None]
        record.calls = []
        if not calls:
            # Only another process needs its weight whole, but it needs this process's part.
            if self._reads_weight and not isinstance(record, ExpertsRecord):
                stored_weight(record.target)
            return
        accumulator = self.asked.accumulator
        for target, samples in _pairs(record, calls, len(self.weights), self._tokens):
            self.found[target.name] = self.asked.measure.of(target, samples, self.weights)
            if accumulator is not None and not self.late:
                accumulator.update(target, samples, self.weights)
        if accumulator is not None and self.late:
            self._kept.append((record, calls))


def check_gradients(found: Mapping[str, Tensor]) -> None:
    """Check the result of a backward pass: B numbers for each target.

    Raises:
        BadSamples: some values are not finite.
    """
    if not found:
        return
    device = next(iter(found.values())).device
    finite = torch.stack([values.to(device) for values in found.values()]).isfinite()
    if finite.all():
        return
    rows = (~finite.all(dim=0)).nonzero().flatten().tolist()
    name = list(found)[int(finite[:, rows[0]].int().argmin())]
    raise BadSamples(
        rows,
        f"the gradient at {name} is not finite",
        f"{name}: the gradient of the loss is not finite on {{}}; calibrate in float32 or "
        "bfloat16, or skip the sample (skip_bad_samples).",
    )


def _pairs(
    record: ModuleRecord, calls: list[Call], size: int, tokens: RealTokens
) -> Iterator[tuple[Target, list[Pairs]]]:
    """Yield each target of a record with the pairs (delta, x) of each of ``size`` samples.

    Experts that no sample reaches are skipped.
    """
    if isinstance(record, ExpertsRecord):
        yield from record.pairs(calls)
    else:
        each = [_own_rows(call, tokens) for call in calls]
        yield record.target, [[own[sample] for own in each] for sample in range(size)]


def _own_rows(call: Call, tokens: RealTokens) -> list[tuple[Tensor, Tensor]]:
    """Return delta_s (T_s x m) and X_s (T_s x d) of each sample, without padding.

    Raises:
        ValueError: the backward pass did not reach the call.
    """
    if call.delta is None:
        raise ValueError("the call has no gradient")
    places, counts = tokens.places(call.mask), tokens.counts(call)
    delta, x = (each.reshape(-1, each.shape[-1]) for each in (call.delta, call.rows))
    if places is not None:
        delta, x = delta[places], x[places]
    delta, x = factors_of_product(delta, x)
    return [*zip(delta.split(counts), x.split(counts), strict=True)]
