"""Keeping the ranks of a sharded model in step, since each holds a part of every weight.

Every pass is run by all of them. They meet before it, and before its backward half; a rank that has
nothing to count in a pass runs it on a spare sample.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from tlora.calibration import batches as reading
from tlora.calibration.distributed import ALONE, Cohort
from tlora.calibration.offload import device_of
from tlora.calibration.sharding import is_sharded


class Company:
    """The ranks that run each pass together; alone with whole weights, no method does anything.

    Args:
        model: what runs.
        ranks: who shares its samples.

    Attributes:
        sharded: whether the model's weights are in parts.
        ranks: who has to be waited for; `ALONE` if the weights are whole.
        spare: a sample to run where there is none to count.
    """

    def __init__(self, model: nn.Module, ranks: Cohort) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        self.ranks = ranks if self.sharded else ALONE
        self.spare: dict[str, Any] = {}

    @property
    def present(self) -> bool:
        """Whether there is another rank to wait for."""
        return self.ranks.size > 1

    def open(self, batch: dict[str, Any] | None) -> bool:
        """Begin a pass, if any rank has a batch for it; return whether."""
        going = self.ranks.meet(busy=batch is not None)
        if going and self.present and not self.spare:
            sample = None
            if batch is not None:
                first = next(reading.single_samples(batch, self.model))
                sample = reading.as_batch(first, torch.device("cpu"))
            device = device_of(self.model)
            self.spare = reading.as_batch(self.ranks.lend(sample), device)
        return going

    def meet(self) -> None:
        """Go on to the second half of a pass.

        Raises:
            Stopped: a rank has failed in the first.
        """
        self.ranks.meet()

    def inside_collectives(self) -> contextlib.AbstractContextManager[None]:
        """Run a half of the pass; see `Cohort.inside_collectives`."""
        return self.ranks.inside_collectives()
