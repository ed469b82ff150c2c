"""Task-aware LoRA: calibrate, plan, attach; A is frozen and B trains (docs/method.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlora.config import TLoraConfig
from tlora.methods.base import Batches, Prepared

if TYPE_CHECKING:
    import torch

    from tlora.adapter.plan import AdapterPlan


class TaskAwareLora:
    """y = W x + s B A x, with A, the rank and the scale s of each module taken from the task."""

    options = TLoraConfig

    def prepare(
        self,
        model: torch.nn.Module,
        options: TLoraConfig,
        batches: Batches,
        plan: AdapterPlan | None = None,
    ) -> Prepared:
        """Attach ``plan``, or calibrate and plan first; the model's output does not change."""
        from tlora.adapter.attach import attach
        from tlora.adapter.blocks import plan_in_blocks
        from tlora.adapter.freeze import FrozenACallback

        if plan is None:
            plan = plan_in_blocks(model, batches, options)
        callbacks = [FrozenACallback()] if options.freeze_a else []
        return Prepared(model=attach(model, plan), plan=plan, callbacks=callbacks)
