"""Task-aware LoRA: calibrate, plan, attach; A is frozen and B trains (docs/method.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tlora.config import TLoraConfig
from tlora.methods.base import Batches, Prepared, Samples, Traits
from tlora.methods.learningrates import LearningRates

if TYPE_CHECKING:
    import torch

    from tlora.adapter.plan import AdapterPlan


class TaskAwareLora:
    """y = W x + s B A x, where A, the rank and the scale s of each module come from the task.

    A: the leading right singular vectors of W C, frozen. Source: arXiv 2604.18124, section 3.
    """

    options: ClassVar[type] = TLoraConfig
    traits: ClassVar[Traits] = Traits(
        title="TLoRA: Task-aware Low Rank Adaptation of Large Language Models",
        arxiv="2604.18124",
        year=2026,
        formula="W x + s_i B A x, A from W C and frozen; r_i and s_i equal, or by sensitivity",
        trains=("lora_B",),
        parameters="r_i m",
        start="identical",
        saved="LoRA of rank r_i",
        learning_rates=LearningRates(
            tiny=2e-3,
            small=5e-4,
            large=1e-4,
            high_rank=2e-5,
            source="The paper on Llama-2-7B: 1e-4 at r = 32, 2e-5 at r = 128. Below a billion"
            " LoRA's.",
        ),
        reads="gradients",
        pools=True,
        source="tlora",
    )

    def prepare(
        self,
        model: torch.nn.Module,
        options: Any,
        batches: Batches,
        plan: AdapterPlan | None = None,
    ) -> Prepared:
        """Attach ``plan``, or calibrate and plan first; the model's output does not change."""
        from tlora.adapter.attach import attach
        from tlora.adapter.freeze import FrozenACallback

        if plan is None:
            plan = self.plan(model, options, batches)
        callbacks = [FrozenACallback()] if options.freeze_a else []
        return Prepared(model=attach(model, plan), plan=plan, callbacks=callbacks)

    def plan(self, model: torch.nn.Module, options: Any, batches: Batches) -> AdapterPlan:
        """Calibrate and plan; the weights may be sharded over processes."""
        from tlora.adapter.attach import made_plan

        samples = Samples.of(batches)
        return made_plan(model, samples.batches, options, **samples.reading)
