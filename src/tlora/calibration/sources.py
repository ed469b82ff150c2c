"""Which modules read the same tensors, from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tlora.calibration.batches import token_layout
from tlora.calibration.collector import forward_options
from tlora.calibration.hooks import Record, recording
from tlora.calibration.targets import Target


def input_sources(
    model: nn.Module, targets: Sequence[Target], batch: dict[str, Any]
) -> dict[str, int]:
    """Return a number for each target that runs, equal for those that read the same tensors.

    Args:
        model: in eval mode, its parameters frozen (see `preserved`).
        targets: the modules to look at.
        batch: tensors on the model's device.
    """
    # Experts in fused parameters share no rows.
    records = {target.name: Record(target) for target in targets if target.part is None}
    layout = token_layout(batch, model)
    with recording(model, records.values(), layout, backward=False), torch.no_grad():
        model(**batch, **forward_options(model, batch))
    numbers: dict[tuple[Any, ...], int] = {}
    return {
        name: numbers.setdefault(record.source, len(numbers))
        for name, record in records.items()
        if record.calls
    }
