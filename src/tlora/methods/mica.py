"""MiCA: LoRA whose frozen B spans the minor left singular vectors of W."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.lora import Lora

if TYPE_CHECKING:
    import torch


class Mica(Lora):
    """y = W x + (lora_alpha / r) B A x: B the last r columns of U of W = U S V^T, frozen; A trains.

    A starts at zero. PEFT does the initialization and freezes B.

    Source: Ruediger and Raschka, arXiv 2604.01694, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        title="MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning",
        arxiv="2604.01694",
        year=2026,
        formula="W x + (alpha / r) B A x, B the last r left singular vectors of W, frozen",
        trains=("lora_A",),
        parameters="r d",
        start="identical",
        learning_rates=LORA_RATES,
    )
    fields: ClassVar[dict[str, Any]] = {"init_lora_weights": "mica"}

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as LoRA's, on floating-point weights. The result is saved as a plain LoRA."""
        from tlora.adapter.initial import refuse_ranks
        from tlora.adapter.stock import refuse_quantized, targets_of

        targets = targets_of(model, options)
        refuse_ranks(targets, options.r)
        refuse_quantized(targets, "PEFT's MiCA takes B from the stored weight")
        adapted: Any = super().prepare(model, options, batches, plan).model
        adapted.peft_config["default"].init_lora_weights = True
        return Prepared(model=adapted)
