"""OLoRA: LoRA that starts from an orthonormal basis of W's columns."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from tlora.methods.base import Batches, Traits
from tlora.methods.learningrates import RESIDUAL_RATES
from tlora.methods.residual import ResidualLora


class Olora(ResidualLora):
    """W = Q R (QR): B_0 = the first r columns of Q, A_0 = the first r rows of R.

    A and B train; the base keeps W - s B_0 A_0. PEFT's initialization.

    Source: Büyükakyüz, arXiv 2406.01775, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        title="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        arxiv="2406.01775",
        year=2024,
        formula="(W - s B0 A0) x + s B A x, B0 A0 the first r columns and rows of W = Q R",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="rounding",
        saved="LoRA of rank 2 r",
        learning_rates=RESIDUAL_RATES,
        changes_base=True,
    )

    def start(self, model: Any, targets: Any, options: Any, batches: Batches) -> Any:
        """Start from the leading part of each weight's QR factors; no batch is read."""
        from peft import LoraConfig

        from tlora.adapter.initial import start_by_peft

        config = LoraConfig(r=options.r, lora_alpha=options.lora_alpha, init_lora_weights="olora")
        return partial(start_by_peft, config=config)
