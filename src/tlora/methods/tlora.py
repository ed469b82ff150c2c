"""Task-aware LoRA: calibrate, plan, attach; A is frozen and B trains (METHOD 2 to 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlora.config import TLoraConfig
from tlora.errors import ArtifactError
from tlora.methods.base import Batches, Prepared

if TYPE_CHECKING:
    import torch

    from tlora.adapter.plan import AdapterPlan


class TaskAwareLora:
    """y = W x + s B A x, with A, the rank and the scale s of each module taken from the task."""

    options = TLoraConfig

    def prepare(self, model: torch.nn.Module, options: TLoraConfig, batches: Batches) -> Prepared:
        """Calibrate on ``batches``, plan and attach; the model's output does not change."""
        from tlora import calibrate, plan

        statistics = calibrate(model, batches, options)
        return self.restore(model, options, plan(model, statistics, options))

    def restore(
        self, model: torch.nn.Module, options: TLoraConfig, plan: AdapterPlan | None
    ) -> Prepared:
        """Attach ``plan`` as it is: the frozen A of a resumed run is the one it started with.

        Raises:
            ArtifactError: there is no plan.
        """
        from tlora import attach
        from tlora.adapter.freeze import FrozenACallback

        if plan is None:
            raise ArtifactError("the run has no plan.safetensors; start it anew without --resume.")
        callbacks = [FrozenACallback()] if options.freeze_a else []
        return Prepared(model=attach(model, plan), plan=plan, callbacks=callbacks)
