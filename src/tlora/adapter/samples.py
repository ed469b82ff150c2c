"""Samples -> plan: through a file of statistics where one is named, else in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from tlora.adapter.blocks import plan_in_blocks
from tlora.adapter.plan import AdapterPlan, plan
from tlora.calibration.probe import calibrate
from tlora.config import TLoraConfig


class Reading(TypedDict, total=False):
    """How calibration samples are read: the keywords of `calibrate`, which explains them."""

    progress: bool
    skip_bad_samples: bool
    cache: str | Path | None


def plan_samples(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    *,
    progress: bool = True,
    skip_bad_samples: bool = False,
    cache: str | Path | None = None,
) -> AdapterPlan:
    """Calibrate and plan.

    With a ``cache`` all statistics are kept, those beyond `config.memory_budget` in mapped files;
    without one no more of them is held than the budget takes (`plan_in_blocks`).

    Args:
        model: the base model.
        batches: calibration samples; see `calibrate`.
        config: the adapter.
        progress: show bars (on a terminal only).
        skip_bad_samples: as for `calibrate`.
        cache: as for `calibrate`.

    Raises:
        TLoraError: as `calibrate` and `plan`.
    """
    if cache is None:
        return plan_in_blocks(
            model, batches, config, progress=progress, skip_bad_samples=skip_bad_samples
        )
    stats = calibrate(
        model, batches, config, progress=progress, skip_bad_samples=skip_bad_samples, cache=cache
    )
    return plan(model, stats, config, progress=progress)
