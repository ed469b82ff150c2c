"""rsLoRA: LoRA with a scale that does not shrink as the rank grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from tlora.checks import POSITIVE
from tlora.methods.base import Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.lora import Lora
from tlora.methods.options import LoraOptions


@dataclass(kw_only=True)
class RsLoraOptions(LoraOptions):
    """LoRA's options with another scale."""

    lora_alpha: Annotated[float, POSITIVE] = 8
    """The adapter's output is multiplied by lora_alpha / sqrt(r)."""

    @property
    def scale(self) -> float:
        """s, the factor of the adapter's output."""
        return self.lora_alpha / math.sqrt(self.r)


class RankStabilizedLora(Lora):
    """y = W x + (lora_alpha / sqrt(r)) B A x: LoRA with another scale.

    Source: Kalajdzievski, arXiv 2312.03732, section 3.
    """

    options: ClassVar[type] = RsLoraOptions
    traits: ClassVar[Traits] = Traits(
        title="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        arxiv="2312.03732",
        year=2023,
        formula="W x + (alpha / sqrt(r)) B A x",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="identical",
        learning_rates=LearningRates(
            tiny=1e-3,
            small=2e-4,
            large=5e-5,
            source="LoRA's, lowered because its scale is sqrt(r) times as large; extrapolated.",
        ),
    )
    fields: ClassVar[dict[str, Any]] = {"use_rslora": True}
