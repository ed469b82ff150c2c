"""rsLoRA: LoRA with a scale that does not shrink as the rank grows."""

from __future__ import annotations

from typing import Any, ClassVar

from tlora.methods.base import Traits
from tlora.methods.lora import Lora


class RankStabilisedLora(Lora):
    """y = W x + (lora_alpha / sqrt(r)) B A x: LoRA, but for the scale.

    Source: Kalajdzievski, arXiv 2312.03732, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        title="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        arxiv="2312.03732",
        year=2023,
        formula="W x + (alpha / sqrt(r)) B A x",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="identical",
    )
    fields: ClassVar[dict[str, Any]] = {"use_rslora": True}
