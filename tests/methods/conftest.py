"""Preparing small models by a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support import causal_samples, in_batches
from tlora.registry import METHODS


@pytest.fixture
def batches() -> Any:
    """Two calibration batches with padding."""
    return in_batches(causal_samples((9, 8, 10, 7, 12, 6)), 3)


@pytest.fixture
def prepared_by(batches: Any) -> Callable[..., Any]:
    """Prepare a model by a method, from the same random state every time."""

    def prepare(name: str, model: Any, plan: Any = None, data: Any = None, **options: Any) -> Any:
        method = METHODS.load(name)()
        torch.manual_seed(5)
        record = method.options(**{"task_type": "CAUSAL_LM"} | options)
        return method.prepare(model, record, batches if data is None else data, plan)

    return prepare
