"""Output gradients -> sensitivities, as a backward pass delivers them.

Source: arXiv 2604.18124, section 3 (docs/method.md, 2): S = (1/n) sum_s mean_jk |W (dL_s/dW)|_jk,
the absolute value taken per sample. dL_s/dW = delta_s^T X_s, so no weight needs a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tlora.calibration.distributed import ALONE, Cohort
from tlora.calibration.experts import ExpertsRecord
from tlora.calibration.hooks import Call, Record
from tlora.calibration.weights import dense_weight, is_whole_weight
from tlora.linalg.magnitude import weighted_magnitude


class SensitivityPass:
    """While open, notes each target's mean |W * dL_s/dW| of every sample in ``found``.

    A target is dealt with as soon as the gradients of all its calls are there, and its tensors
    are dropped: no full set of gradients, nor of inputs, outlives its use.

    Args:
        records: what the forward pass recorded.
        weights: B; what turns the gradient of the batch's loss at the rows of sample s into that
            of the sample's own loss: (labels in the batch) / (labels of s).
        found: by target name: B numbers, on the target's device; filled.
        company: the ranks that hold a part of each weight. One that is not whole when a gradient
            arrives is gathered by all of them at the end of the pass.
    """

    def __init__(
        self,
        records: Iterable[Record],
        weights: Tensor,
        found: dict[str, Tensor],
        company: Cohort = ALONE,
    ) -> None:
        self.records = list(records)
        self.weights = weights.tolist()
        self.found = found
        self.company = company
        self._handles: list[Any] = []

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
        # Calls that the loss does not depend on never get a gradient: add the others.
        left = [any(call.delta is not None for call in record.calls) for record in self.records]
        for record, wanted in zip(self.records, self.company.highest(left), strict=True):
            if wanted:
                self._add(record)
            record.calls = []

    def _receive(self, record: Record, call: Call, deltas: tuple[Tensor | None, ...]) -> None:
        if call.output is not None:
            call.delta = deltas[call.output.output_nr]
        complete = all(other.delta is not None for other in record.calls)
        if complete and is_whole_weight(record.target.module):
            self._add(record)

    def _add(self, record: Record) -> None:
        calls = [call for call in record.calls if call.delta is not None]
        record.calls = []
        if isinstance(record, ExpertsRecord):
            self.found |= record.magnitudes(calls, self.weights)
            return
        weight = dense_weight(record.target)
        if not calls:
            return  # another rank alone had use for it
        samples = [
            [_own_rows(call, sample) for call in calls] for sample in range(len(self.weights))
        ]
        values = weighted_magnitude(weight, samples)
        factors = torch.tensor(self.weights, dtype=values.dtype, device=values.device)
        self.found[record.target.name] = factors * values / weight.numel()


def _own_rows(call: Call, sample: int) -> tuple[Tensor, Tensor]:
    """Return delta_s (T_s x m) and X_s (T_s x d) of a sample in float32, padding left out."""
    if call.delta is None:
        raise ValueError("the call has no gradient")
    x = call.rows[sample]
    delta = call.delta.reshape(*call.rows.shape[:2], call.delta.shape[-1])[sample]
    if call.mask is not None:
        x, delta = x[call.mask[sample]], delta[call.mask[sample]]
    return delta.float(), x.float()
