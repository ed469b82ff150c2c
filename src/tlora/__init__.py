"""Task-aware LoRA: calibrated, frozen A; trained B; a plain PEFT adapter out.

The public names are loaded on first use, so that ``import tlora`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tlora.adapter.attach import attach, get_tlora_model
    from tlora.adapter.freeze import freeze_a
    from tlora.adapter.load import load_adapter
    from tlora.adapter.plan import AdapterPlan, ModulePlan
    from tlora.adapter.planning import plan
    from tlora.calibration.probe import calibrate
    from tlora.calibration.statistics import Calibration, ModuleStatistics
    from tlora.config import TLoraConfig
    from tlora.errors import TLoraError
    from tlora.methods.learningrates import default_learning_rate
    from tlora.tasks.calibration_batches import calibration_batches

_HOME = {
    "AdapterPlan": "tlora.adapter.plan",
    "Calibration": "tlora.calibration.statistics",
    "ModulePlan": "tlora.adapter.plan",
    "ModuleStatistics": "tlora.calibration.statistics",
    "TLoraConfig": "tlora.config",
    "TLoraError": "tlora.errors",
    "attach": "tlora.adapter.attach",
    "calibrate": "tlora.calibration.probe",
    "calibration_batches": "tlora.tasks.calibration_batches",
    "default_learning_rate": "tlora.methods.learningrates",
    "freeze_a": "tlora.adapter.freeze",
    "get_tlora_model": "tlora.adapter.attach",
    "load_adapter": "tlora.adapter.load",
    "plan": "tlora.adapter.planning",
}

__all__ = [
    "AdapterPlan",
    "Calibration",
    "ModulePlan",
    "ModuleStatistics",
    "TLoraConfig",
    "TLoraError",
    "attach",
    "calibrate",
    "calibration_batches",
    "default_learning_rate",
    "freeze_a",
    "get_tlora_model",
    "load_adapter",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tlora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
