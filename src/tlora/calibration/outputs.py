"""The second moments of module outputs over the calibration samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.accumulators import sum_over
from tlora.calibration.budget import given
from tlora.calibration.collector import Collector
from tlora.calibration.group import ProcessGroup
from tlora.calibration.hooks import Call, ModuleRecord
from tlora.calibration.placement import device_of
from tlora.calibration.probe import begin, first_pass, probing, progress_bar, warn_of_skipped
from tlora.calibration.weights import Target
from tlora.config import TLoraConfig
from tlora.linalg.moments import SecondMoment


def output_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    skip_bad_samples: bool = False,
) -> dict[str, SecondMoment]:
    """Return the second moment of each target's outputs (m x m), by the target's name.

    Reads the batches and restores the model as `calibrate` does; all moments stay in memory.

    Args:
        model: the base model.
        batches: dicts of the model's forward arguments.
        config: selects the modules.
        skip_bad_samples: as for `calibrate`.

    Raises:
        CalibrationError, ConfigError: as `calibrate`.
    """
    group, model, targets = begin(model, config)
    outputs = _OutputAccumulator(targets)
    collector = Collector(model, targets, outputs, None, skip_bad_samples, group)
    bar = progress_bar(batches, group.is_main_process)
    with probing(model), bar:
        first_pass(collector, batches, given(config), bar)
    if group.is_main_process:
        warn_of_skipped(collector.skipped, collector.given, stacklevel=2)
    return outputs.moments


class _OutputAccumulator:
    """Accumulates the second moments of the targets' outputs."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.moments = {
            target.name: SecondMoment(target.d_out, device=device_of(target.module))
            for target in targets
        }

    def prepare(self, records: Mapping[str, ModuleRecord]) -> None:
        """Keep all outputs."""
        for record in records.values():
            record.keeps_outputs = True

    def update(self, records: Mapping[str, ModuleRecord], size: int) -> None:
        """Add a batch."""
        for name, record in records.items():
            moment = self.moments[name]
            if not record.calls:
                moment.samples += size
                continue
            outputs = torch.cat([_output(call, record.target) for call in record.calls], dim=1)
            moment.update(outputs.to(moment.device), record.joined(size)[1])

    def pool(self, targets: Sequence[Target], group: ProcessGroup) -> None:
        """Sum the moments over all processes."""
        if group.size > 1:
            self.moments = {t.name: sum_over(group, self.moments[t.name]) for t in targets}


def _output(call: Call, target: Target) -> Tensor:
    """Return the output of a call, B x T x m; recomputed if the model has overwritten it."""
    values, version = call.result or (call.inputs, None)
    if values._version != version:
        values = target.module.forward(call.inputs).detach()
    return values.reshape(*call.rows.shape[:2], values.shape[-1])
