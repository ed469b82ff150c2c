"""DoRA: trains the weight's magnitude and direction separately."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.lora import Lora

if TYPE_CHECKING:
    import torch


class Dora(Lora):
    """y = g * (W + s B A) / ||W + s B A|| x, norms of the rows; A, B and the magnitudes g train.

    g (m numbers) starts at the row norms of W. s = lora_alpha / r. Gradients do not pass through
    the norm in the denominator, as the paper proposes and PEFT does.

    Source: Liu et al., arXiv 2402.09353, sections 4.1 to 4.3.
    """

    traits: ClassVar[Traits] = Traits(
        title="DoRA: Weight-Decomposed Low-Rank Adaptation",
        arxiv="2402.09353",
        year=2024,
        formula="g (W + (alpha / r) B A) / ||W + (alpha / r) B A|| x",
        trains=("lora_A", "lora_B", "lora_magnitude_vector"),
        parameters="r (m + d) + m",
        start="rounding",
        saved="DoRA of rank r",
        learning_rates=LearningRates(
            tiny=2e-3,
            small=5e-4,
            large=1e-4,
            source="The authors' scripts (NVlabs/DoRA): 1e-4 on Llama-3-8B, 2e-4 on Llama-2-7B."
            " Below a billion LoRA's.",
        ),
    )
    fields: ClassVar[dict[str, Any]] = {"use_dora": True}

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as LoRA's."""
        from tlora.adapter.stock import refuse_stored, targets_of

        # Reading the weight's norms makes bitsandbytes lose its scales.
        refuse_stored(targets_of(model, options), int8="PEFT's DoRA does not run on these layers")
        return super().prepare(model, options, batches, plan)
