"""Task-aware LoRA: calibrate, plan, attach; A is frozen and B trains (docs/method.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tlora.config import TLoraConfig
from tlora.methods.base import Batches, Prepared, Samples, Traits

if TYPE_CHECKING:
    import torch

    from tlora.adapter.plan import AdapterPlan


class TaskAwareLora:
    """y = W x + s B A x, with A, the rank and the scale s of each module taken from the task.

    A: the leading right singular vectors of W C, frozen. Source: arXiv 2604.18124, section 3.
    """

    options: ClassVar[type] = TLoraConfig
    traits: ClassVar[Traits] = Traits(
        title="TLoRA: Task-aware Low Rank Adaptation of Large Language Models",
        arxiv="2604.18124",
        year=2026,
        formula="W x + s_i B A x, A from W C and frozen, ranks r_i and scales s_i by sensitivity",
        trains=("lora_B",),
        parameters="r_i m",
        start="identical",
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
            plan = _planned(model, Samples.of(batches), options)
        callbacks = [FrozenACallback()] if options.freeze_a else []
        return Prepared(model=attach(model, plan), plan=plan, callbacks=callbacks)

    def trainable(self, model: torch.nn.Module, options: Any) -> int | None:
        """Return sum_i r_i m_i (plus sum_i r_i d_i where A trains) at equal ranks, within bounds.

        None where the ranks are allocated by sensitivity.
        """
        import dataclasses

        from tlora.adapter.shares import allocate
        from tlora.calibration.module_statistics import ModuleStatistics
        from tlora.calibration.targets import find_targets

        if options.allocate_rank:
            return None
        targets = find_targets(model, options)
        unmeasured = [ModuleStatistics(t.name, t.d_in, t.d_out, 0, 1.0) for t in targets]
        shares = allocate(targets, unmeasured, dataclasses.replace(options, allocate_scale=False))
        inputs = 0 if options.freeze_a else 1
        return sum(shares.of[t.name].rank * (t.d_out + inputs * t.d_in) for t in targets)


def _planned(model: torch.nn.Module, samples: Samples, config: TLoraConfig) -> AdapterPlan:
    """Calibrate and plan, as `tlora.get_tlora_model` does."""
    from tlora.adapter.blocks import plan_in_blocks
    from tlora.adapter.planning import plan
    from tlora.calibration.probe import calibrate

    if config.plans_in_blocks:
        return plan_in_blocks(model, samples.batches, config, **samples.reading)
    return plan(model, calibrate(model, samples.batches, config, **samples.reading), config)
