"""One pass over calibration batches: forward, and where sensitivities are wanted backward.

How a batch is read, in order:

1. forward; hooks keep each target's input X and make its output a place where the gradient can be
   seen (a graph starts at the first targets, so nothing before them is differentiated);
2. the inputs are split into samples, checked to be finite, and added to the second moments, once
   for modules that read the same tensor;
3. backward; when the gradient delta of a target's output arrives, |W * (delta_s^T X_s)| of every
   sample is averaged and both tensors are dropped, so no full set of gradients is ever held.

Source: arXiv 2604.18124, section 3 (docs/method.md, 2). The release runs one sample at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration import batches as reading
from tlora.calibration.bank import Accumulator
from tlora.calibration.hooks import AllSeen, Record, recording
from tlora.calibration.sensitivity import SensitivityPass
from tlora.calibration.targets import Target
from tlora.errors import CalibrationError


@dataclass
class Unit:
    """A batch that was read in one forward pass, for passes that come later.

    Attributes:
        batch: the tensors.
        calls: how often each target ran, so that a later pass knows when it has seen enough.
    """

    batch: dict[str, Any]
    calls: dict[str, int] = field(default_factory=dict)


class Collector:
    """Accumulates statistics of targets over batches.

    Args:
        model: in eval mode, its parameters frozen (see `preserved`).
        targets: the modules to look at.
        bank: where the inputs go; None: only sensitivities are wanted.
        backward: measure sensitivities too.

    Attributes:
        samples: samples seen so far.
        units: what was read in one forward pass each, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        bank: Accumulator | None,
        backward: bool,
    ) -> None:
        self.model = model
        self.targets = targets
        self.bank = bank
        self.backward = backward
        self.samples = 0
        self.units: list[Unit] = []
        self._sensitivity: dict[str, Tensor] = {}

    def add(self, batch: dict[str, Any], alone: bool = False) -> None:
        """Add a batch; cut it into single samples where its rows or loss cannot be split.

        Args:
            batch: tensors on the model's device.
            alone: it is one such sample, without padding.
        """
        weights = reading.loss_weights(batch, self.model)
        known = weights is not None or reading.batch_size(batch) == 1
        if known or not self.backward:
            try:
                self._add(Unit(batch), weights)
                return
            except reading.UnknownLayout:
                if alone:
                    raise CalibrationError(
                        f"sample {self.samples}: its rows of some module's input cannot be told"
                        " from padding; give it without padding."
                    ) from None
        for sample in reading.single_samples(batch, self.model):
            self.add(sample, alone=True)

    def add_again(self, unit: Unit) -> None:
        """Add what an earlier pass has read; the forward pass stops once every target has run."""
        self._add(unit, None)

    def sensitivity(self, name: str) -> float | None:
        """Return S of a target, or None where none was measured.

        Raises:
            CalibrationError: it is not finite.
        """
        if not self.backward:
            return None
        total = self._sensitivity.get(name)
        # A module that no sample reached does not move the loss.
        value = 0.0 if total is None else total.item() / self.samples
        if not math.isfinite(value):
            raise CalibrationError(
                f"{name}: the gradient of the loss is not finite; calibrate in float32 or"
                " bfloat16, or leave the sample out."
            )
        return value

    def _add(self, unit: Unit, weights: Tensor | None) -> None:
        batch = unit.batch
        layout = reading.token_layout(batch, self.model)
        records = {target.name: Record(target) for target in self.targets}
        outputs = self._forward(unit, records, layout)
        unit.calls = unit.calls or {name: len(r.calls) for name, r in records.items()}
        for record in records.values():
            record.split(layout)
        self._check_finite(records)
        if self.backward:
            factors = self._checked_weights(weights)
            loss = self._finite_loss(outputs, batch)
        if self.bank is not None:
            self.bank.update(records, layout.size)
        if self.backward:
            with SensitivityPass(records.values(), factors, self._sensitivity):
                # It does not where these samples reach no target (an expert).
                if loss.requires_grad:
                    loss.backward()
        self.samples += layout.size
        self.units.append(unit)

    def _forward(self, unit: Unit, records: dict[str, Record], layout: reading.TokenLayout) -> Any:
        options = forward_options(self.model, unit.batch)
        with (
            recording(self.model, records.values(), layout, self.backward, unit.calls),
            torch.set_grad_enabled(self.backward),
            contextlib.suppress(AllSeen),
        ):
            return self.model(**unit.batch, **options)
        return None

    def _check_finite(self, records: dict[str, Record]) -> None:
        calls = [
            (r.target.name, call)
            for r in records.values()
            for call in r.calls
            if call.inputs.numel() > 0
        ]
        if not calls:
            return
        device = calls[0][1].inputs.device
        # A sum is finite only if every entry is: the cheapest check, one transfer for all. Should
        # finite entries overflow it, the exact look below finds nothing wrong.
        sums = [c.inputs.sum(dtype=torch.float32).to(device) for _, c in calls]
        if torch.stack(sums).isfinite().all():
            return
        for name, call in calls:
            bad = ~call.rows.isfinite().all(dim=-1)
            if call.mask is not None:
                bad &= call.mask
            if bad.any():
                sample = self.samples + int(bad.any(dim=1).nonzero()[0])
                raise CalibrationError(
                    f"{name}: its input is not finite on sample {sample} (counted from 0); check"
                    " that sample, or calibrate in float32 or bfloat16."
                )

    def _checked_weights(self, weights: Tensor | None) -> Tensor:
        if weights is None:
            return torch.ones(1)
        empty = (~weights.isfinite()).nonzero()
        if len(empty):
            raise CalibrationError(
                f"sample {self.samples + int(empty[0])} (counted from 0) has no label that counts:"
                " every label is -100, so its loss is undefined; leave it out or truncate less."
            )
        return weights

    def _finite_loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise CalibrationError(
                f"{type(self.model).__name__} returned no single loss for a batch with the keys"
                f" {sorted(batch)}; add `labels`, or allocate neither ranks nor scales."
            )
        if not loss.isfinite():
            sample = self._first_bad_sample(batch)
            raise CalibrationError(
                f"the loss of sample {sample} (counted from 0) is {loss.item()}; check its labels"
                " and text, or calibrate in float32 or bfloat16."
            )
        return loss

    def _first_bad_sample(self, batch: dict[str, Any]) -> int:
        with torch.no_grad():
            for index, sample in enumerate(reading.single_samples(batch, self.model)):
                if not self.model(**sample)["loss"].isfinite():
                    return self.samples + index
        return self.samples


def forward_options(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Switch the key-value cache off where the model has one: nothing is generated here."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes and "use_cache" not in batch else {}
