"""One pass over calibration batches: forward, and backward if sensitivities are needed.

A batch is read in this order:

1. forward; hooks keep each target's input X and mark its output so that its gradient is visible (a
   graph starts at the first targets, so nothing before them is differentiated);
2. the inputs are split into samples, checked to be finite, and added to the second moments, once
   for modules that read the same tensor;
3. backward; when the gradient delta of a target's output arrives, |W * (delta_s^T X_s)| of every
   sample (or another measure) is averaged and both tensors are dropped, so the gradients of a batch
   are never all in memory.

Bad samples (no counted label; an input, a loss or a gradient that is not finite) raise or are
skipped. When skipped, the batch is read again without them, and step 2 waits for step 3, since
gradients come last.

The processes of a sharded model run every pass together (`Lockstep`).

Source: arXiv 2604.18124, section 3 (docs/method.md, 2). The release runs one sample at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration import batches as reading
from tlora.calibration.accumulators import Accumulator, GradientAccumulator
from tlora.calibration.backward import Backward, SensitivityPass, check_gradients
from tlora.calibration.batches import BadSamples, checked_weights, numbered
from tlora.calibration.experts import by_target, records_of
from tlora.calibration.group import SINGLE_PROCESS, Lockstep, ProcessGroup
from tlora.calibration.hooks import AllSeen, ModuleRecord, check_inputs, recording
from tlora.calibration.placement import class_name, reshard
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.weights import Target
from tlora.errors import CalibrationError


@dataclass
class MicroBatch:
    """A batch that was read in one forward pass, kept for later passes.

    Attributes:
        batch: the tensors.
        numbers: of its samples in the order given, counted from 0.
        calls: how often each target ran, so that a later pass can stop early.
    """

    batch: dict[str, Any]
    numbers: tuple[int, ...]
    calls: dict[str, int] = field(default_factory=dict)

    def without(self, rows: Collection[int]) -> MicroBatch:
        """Return the samples except those in ``rows``."""
        size = len(self.numbers)
        kept = [row for row in range(size) if row not in rows]
        batch = {
            key: value[kept] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
            for key, value in self.batch.items()
        }
        return MicroBatch(batch, tuple(self.numbers[row] for row in kept))


class Collector:
    """Accumulates statistics of targets over batches.

    Args:
        model: in eval mode, with frozen parameters (see `preserved`).
        targets: the modules to measure.
        accumulator: consumes the inputs; None: inputs are not needed.
        backward: purpose of the backward pass; None: no backward pass runs.
        skip_bad_samples: skip bad samples as if they had not been given; otherwise they raise.
        group: the processes that share the samples.

    Attributes:
        samples: number of good samples so far.
        given: number of samples so far, skipped ones included.
        skipped: number (counted from 0) of each skipped sample, and the reason.
        keep_micro_batches: whether batches are kept for later passes.
        micro-batches: the kept micro-batches, in order.
        sensitivities: sum over samples of the measure, by target, on the target's device.
        stage: the current step, for the message if memory runs out.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        accumulator: Accumulator | None,
        backward: Backward | None,
        skip_bad_samples: bool = False,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.model = model
        self.targets = targets
        self.accumulator = accumulator
        self.backward = backward
        self.skip_bad_samples = skip_bad_samples
        self.group = group
        self.lockstep = Lockstep(model, group)
        self.samples = 0
        self.given = 0
        self.skipped: dict[int, str] = {}
        self.keep_micro_batches = False
        self.micro_batches: list[MicroBatch] = []
        self.sensitivities: dict[str, Tensor] = {}
        self._reached: set[str] = set()
        self.stage = "reading"

    @property
    def gradients(self) -> GradientAccumulator | None:
        """Where gradients are accumulated; None: gradients are not needed."""
        return None if self.backward is None else self.backward.accumulator

    def add(self, batch: dict[str, Any]) -> None:
        """Add a batch of tensors on the model's device.

        It is split into single samples if its rows or loss cannot be split.
        """
        size = reading.batch_size(batch)
        batch = reading.scored_from_tokens(batch, self.model)
        self._take(MicroBatch(batch, tuple(range(self.given, self.given + size))))
        self.given += size

    def add_again(self, micro_batch: MicroBatch) -> None:
        """Add a micro-batch that an earlier pass has read.

        Without a backward pass the forward pass stops once every target has run.
        """
        weights = reading.loss_weights(micro_batch.batch, self.model) if self.backward else None
        self._add(micro_batch, weights)

    def run_spare_passes(self) -> None:
        """Run passes without samples while other processes have samples left."""
        while self.lockstep.begin_pass(None):
            spare = self.lockstep.spare
            records = records_of(self.targets)
            layout = reading.token_layout(spare, self.model)
            outputs = self._forward(MicroBatch(spare, ()), records, layout)
            self._finish_uncounted(records, outputs)

    def pool(self) -> None:
        """Sum the measures over all processes; each process gets the result for all samples.

        Samples are numbered process by process.
        """
        if self.group.size > 1:
            totals = {name: total.item() for name, total in self.sensitivities.items()}
            parts = self.group.all_gather((self.samples, self.given, self.skipped, totals))
            self.samples = self.given = 0
            self.skipped, self.sensitivities = {}, {}
            for samples, given, skipped, found in parts:
                self.skipped |= {self.given + number: why for number, why in skipped.items()}
                self.samples += samples
                self.given += given
                for name, total in found.items():
                    self._add_to(name, torch.tensor(total, dtype=torch.float64))
        if self.accumulator is not None:
            self.accumulator.pool(self.targets, self.group)
        if self.gradients is not None:
            self.gradients.pool(self.targets, self.group)
        reshard(self.model)

    def doing(self, first: int, count: int) -> str:
        """Return the current step and its samples: "the backward pass of samples 4 to 7"."""
        return f"{self.stage} of {numbered(first, count)}"

    def measured(self, target: Target) -> ModuleStatistics:
        """Return the measures of a target, without the accumulators' statistics.

        Raises:
            CalibrationError: a measure is not finite.
        """
        found = ModuleStatistics(target.name, target.d_in, target.d_out, self.samples, None)
        if self.backward is not None and self.backward.statistic is not None:
            setattr(found, self.backward.statistic, self._mean(target.name))
        return found

    def unreached(self) -> list[str]:
        """Return the targets that ran in no batch, except experts, which routing may skip.

        None if unknown: this process read nothing, or other processes read too.
        """
        if not self._reached or self.group.size > 1:
            return []
        names = records_of(self.targets).keys() - self._reached
        return [t.name for t in self.targets if t.name in names and "expert" not in t.name]

    def _mean(self, name: str) -> float:
        total = self.sensitivities.get(name)
        # A module that no sample reached does not change the loss.
        value = 0.0 if total is None else total.item() / self.samples
        if not math.isfinite(value):
            raise CalibrationError(
                f"{name}: its sensitivity overflows, though that of every sample is finite; "
                "calibrate on fewer samples."
            )
        return value

    def _take(self, micro_batch: MicroBatch, alone: bool = False) -> None:
        """Add the good samples of a micro-batch; ``alone``: it is one sample without padding."""
        rest = self._try(micro_batch, alone)
        if rest is None:
            samples = reading.single_samples(micro_batch.batch, self.model)
            for number, sample in zip(micro_batch.numbers, samples, strict=True):
                self._take(MicroBatch(sample, (number,)), alone=True)
        elif rest.numbers:
            self._take(rest, alone)

    def _try(self, micro_batch: MicroBatch, alone: bool) -> MicroBatch | None:
        """Add a micro-batch; return the part to retry, or None to retry sample by sample.

        Raises:
            CalibrationError: a sample is bad, and bad samples are not skipped.
        """
        weights = reading.loss_weights(micro_batch.batch, self.model)
        if self.backward and weights is None and len(micro_batch.numbers) > 1:
            return None
        try:
            self._add(micro_batch, weights)
        except reading.UnknownLayout:
            if alone:
                raise CalibrationError(
                    f"sample {micro_batch.numbers[0]}: its rows of some module's input cannot be "
                    "told from padding; give it without padding."
                ) from None
            return None
        except BadSamples as bad:
            if not self.skip_bad_samples:
                sample = numbered(micro_batch.numbers[bad.rows[0]], 1)
                raise CalibrationError(bad.sentence.replace("{}", sample)) from None
            self.skipped |= {micro_batch.numbers[row]: bad.reason for row in bad.rows}
            return micro_batch.without(bad.rows)
        return micro_batch.without(range(len(micro_batch.numbers)))

    def _add(self, micro_batch: MicroBatch, weights: Tensor | None) -> None:
        if self.backward:
            factors = checked_weights(weights)
        self.stage = "the forward pass"
        layout = reading.token_layout(micro_batch.batch, self.model)
        records = records_of(self.targets)
        if self.accumulator is not None:
            self.accumulator.prepare(records)
        self.lockstep.begin_pass(micro_batch.batch)
        outputs = self._forward(micro_batch, records, layout)
        micro_batch.calls = micro_batch.calls or {name: len(r.calls) for name, r in records.items()}
        self._reached |= {name for name, count in micro_batch.calls.items() if count}
        try:
            for record in records.values():
                record.split(layout)
            check_inputs(records)
            loss = self._finite_loss(outputs, micro_batch) if self.backward else None
        except (reading.UnknownLayout, BadSamples):
            self._finish_uncounted(records, outputs)
            raise
        waits = self.skip_bad_samples and self.accumulator is not None and loss is not None
        late = _inputs_of(records) if waits else None
        if late is None:
            self._update(records, layout.size)
        self.lockstep.group.barrier()
        if loss is not None:
            self._add_gradients(records, factors, loss)
        if late is not None:
            self._update(late, layout.size)
        self.samples += layout.size
        if self.keep_micro_batches:
            self.micro_batches.append(micro_batch)

    def _finish_uncounted(self, records: dict[str, ModuleRecord], outputs: Any) -> None:
        """Run the second half of a pass only because other processes of a sharded model need it."""
        if not self.lockstep.active:
            return
        for record in records.values():
            record.calls = []
        self.lockstep.group.barrier()
        if self.backward:
            self._run_back(records, torch.ones(0), outputs["loss"])

    def _update(self, records: Mapping[str, ModuleRecord], size: int) -> None:
        self.stage = "adding to the second moments"
        if self.accumulator is not None:
            self.accumulator.update(by_target(records), size)

    def _add_gradients(
        self, records: dict[str, ModuleRecord], factors: Tensor, loss: Tensor
    ) -> None:
        self.stage = "the backward pass"
        done = self._run_back(records, factors, loss)
        check_gradients(done.found)
        done.accumulate()
        if done.asked.statistic is not None:
            for name, values in done.found.items():
                self._add_to(name, values.sum())

    def _run_back(
        self, records: dict[str, ModuleRecord], factors: Tensor, loss: Tensor
    ) -> SensitivityPass:
        if self.backward is None:
            raise ValueError("the backward pass has no purpose")
        group, late = self.lockstep.group, self.skip_bad_samples
        # A mean over B samples has gradients 1/B the size, which may underflow in 16 bits; scaling
        # by a power of two is exact.
        scale = float(2 ** (max(1, len(factors)).bit_length() - 1))
        done = SensitivityPass(records.values(), factors / scale, self.backward, group, late)
        with done:
            # It does not if these samples reach no target (an expert).
            if loss.requires_grad:
                with self.lockstep.group.inside_collectives():
                    (loss * scale).backward()
        return done

    def _add_to(self, name: str, total: Tensor) -> None:
        before = self.sensitivities.get(name)
        self.sensitivities[name] = total if before is None else before + total

    def _forward(
        self, micro_batch: MicroBatch, records: dict[str, ModuleRecord], layout: reading.TokenLayout
    ) -> Any:
        options = forward_options(self.model, micro_batch.batch)
        backward = self.backward is not None
        # Stopping halfway would leave a sharded model's weights gathered; a backward pass needs the
        # loss.
        expected = None if self.lockstep.sharded or backward else micro_batch.calls
        with (
            self.lockstep.group.inside_collectives(),
            recording(self.model, records.values(), layout, backward, expected),
            torch.set_grad_enabled(backward),
            contextlib.suppress(AllSeen),
        ):
            return self.model(**micro_batch.batch, **options)
        return None

    def _finite_loss(self, outputs: Any, micro_batch: MicroBatch) -> Tensor:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise CalibrationError(
                f"{class_name(self.model)} returned no single loss for a batch with the keys "
                f"{sorted(micro_batch.batch)}; add `labels`, or set `allocate_rank` and "
                "`allocate_scale` to false and choose a `basis` without gradients."
            )
        if not loss.isfinite():
            if self.lockstep.active and len(micro_batch.numbers) > 1:
                # Each sample gets its own pass, announced to the other processes.
                raise reading.UnknownLayout
            losses = (
                self._single_losses(micro_batch) if len(micro_batch.numbers) > 1 else [loss.item()]
            )
            rows = [row for row, value in enumerate(losses) if not math.isfinite(value)]
            if not rows:
                # The batch overflows, the single samples do not.
                raise reading.UnknownLayout
            value = losses[rows[0]]
            raise BadSamples(
                rows,
                f"its loss is {value}",
                f"the loss of {{}} is {value}; check its labels and text, or calibrate in float32 "
                "or bfloat16.",
            )
        return loss

    def _single_losses(self, micro_batch: MicroBatch) -> list[float]:
        with torch.no_grad():
            samples = reading.single_samples(micro_batch.batch, self.model)
            return [self.model(**sample)["loss"].item() for sample in samples]


def _inputs_of(records: Mapping[str, ModuleRecord]) -> dict[str, ModuleRecord]:
    """Return records that hold only the inputs and outlast the backward pass."""
    return {
        name: replace(record, calls=[replace(c, output=None, delta=None) for c in record.calls])
        for name, record in records.items()
    }


def forward_options(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Switch the key-value cache off if the model has one; nothing is generated here."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes and "use_cache" not in batch else {}
