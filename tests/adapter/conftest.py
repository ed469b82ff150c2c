"""Families of models that have been calibrated, and a few steps of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from support import Family, Sample, make_family
from tlora import AdapterPlan, Calibration, TLoraConfig, calibrate, plan


@dataclass
class Calibrated:
    """A base model, a batch of the task, and what was measured on it."""

    model: Any
    batch: Sample
    stats: Calibration
    fields: dict[str, Any]
    family: Family

    def config(self, **fields: Any) -> TLoraConfig:
        return TLoraConfig(**({"r": 2, "lora_alpha": 2} | self.fields | fields))

    def plan(self, **fields: Any) -> AdapterPlan:
        return plan(self.model, self.stats, self.config(**fields))


@pytest.fixture
def calibrated(request: Any) -> Callable[..., Calibrated]:
    """Calibrate a fresh model of a family; ``dtype`` converts it first."""

    def make(name: str, dtype: Any = None) -> Calibrated:
        family = make_family(name, request.getfixturevalue)
        model = family.model if dtype is None else family.model.to(dtype)
        [batch] = family.batches(len(family.samples))
        if dtype is not None and "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
        stats = calibrate(model, [batch], TLoraConfig(**family.config))
        return Calibrated(model, batch, stats, family.config, family)

    return make
