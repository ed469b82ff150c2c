"""MTLoRA: LoRA with a trained r x r matrix between A and B."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.lora import Lora
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class MtLoraOptions(LoraOptions):
    """LoRA's options, and how T is made."""

    structure: Literal["shim", "icfm", "ctcm", "dtsm"] = "shim"
    """The r x r matrix T: "shim" is C, "icfm" C C^T, "ctcm" C D, "dtsm" C + D; C and D train."""


class MtLora(Lora):
    """y = W x + (lora_alpha / r) B T A x; A, B and the one or two r x r matrices of T train.

    B starts at zero; A, C and D are uniform up to 1 / sqrt(columns). T = I would be LoRA. The saved
    adapter is a plain LoRA, with B T for B.

    Source: Liang et al., arXiv 2403.07440; the structures' formulas and the start: the authors'
    code.
    """

    options: ClassVar[type] = MtLoraOptions
    traits: ClassVar[Traits] = Traits(
        title="Matrix-Transformation Based Low-Rank Adaptation (MTLoRA): A Brain-Inspired Method"
        " for Parameter-Efficient Fine-Tuning",
        arxiv="2403.07440",
        year=2024,
        formula="W x + (alpha / r) B T A x, T (r x r) is C, C C^T, C D or C + D",
        trains=("lora_A", "lora_B.default.up", "lora_B.default.core_"),
        parameters="r (m + d) + r^2, with C and D r (m + d) + 2 r^2",
        start="identical",
        learning_rates=LORA_RATES,
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """As LoRA's, with T before B. A, C and D are drawn from torch's global generator."""
        from tlora.adapter.three_factors import make_transformed, save_written_out

        adapted: Any = super().prepare(model, options, batches, plan).model
        make_transformed(adapted, options.structure)
        return Prepared(model=adapted, writer=partial(save_written_out, adapted))
