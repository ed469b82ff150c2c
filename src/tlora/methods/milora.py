"""MiLoRA: LoRA that starts from the minor singular components of W."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from tlora.methods.base import Batches, Traits
from tlora.methods.learningrates import RESIDUAL_RATES
from tlora.methods.residual import ResidualLora


class Milora(ResidualLora):
    """W = U S V^T: B_0 = U_r (S_r / s)^(1/2), A_0 = (S_r / s)^(1/2) V_r^T, the last r.

    A and B train; the base keeps the principal components, W - s B_0 A_0. As in PiSSA, S is divided
    by s, so that exactly the minor part is taken out at any lora_alpha.

    Source: Wang et al., arXiv 2406.09044, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        title="MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        arxiv="2406.09044",
        year=2024,
        formula="(W - s B0 A0) x + s B A x, s B0 A0 the last r singular components of W",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="rounding",
        saved="LoRA of rank 2 r",
        learning_rates=RESIDUAL_RATES,
        changes_base=True,
        source="tlora",
    )

    def start(self, model: Any, targets: Any, options: Any, batches: Batches) -> Any:
        """Start from the minor components of each weight; no batch is read."""
        from tlora.calibration.weights import dense_weight
        from tlora.linalg.bases import singular_part

        def part(target: Any) -> Any:
            b, a = singular_part(dense_weight(target), options.r, minor=True)
            return a / math.sqrt(options.scale), b / math.sqrt(options.scale)

        return part
