"""LoRA-RITE: LoRA with an optimizer that is invariant to the factorization of B A."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.lora import Lora
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch

OPTIM = "lora_rite"
"""The trainer's `optim` value that selects this optimizer for any method that trains B."""


@dataclass(kw_only=True)
class LoraRiteOptions(LoraOptions):
    """LoRA's options, and the optimizer's."""

    eps: Annotated[float, POSITIVE] = 1e-6
    """Added to the roots of the second moments before inversion."""

    @property
    def own_optimizer(self) -> bool:
        """See `MethodOptions`."""
        return True


class LoraRite(Lora):
    """LoRA whose optimizer is `tlora.adapter.rite.LoraRite`.

    It uses the trainer's `learning_rate`, schedule, `adam_beta1`, `adam_beta2` and `weight_decay`;
    `adam_epsilon` applies to parameters other than A and B, which AdamW trains.

    Source: Yen et al., arXiv 2410.20625, section 3.
    """

    options: ClassVar[type] = LoraRiteOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization",
        arxiv="2410.20625",
        year=2024,
        formula="W x + (alpha / r) B A x, steps that are the same for (M A, B M^-1)",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="identical",
        learning_rates=LearningRates(
            tiny=2e-3,
            small=5e-4,
            large=2e-4,
            huge=1e-4,
            source="The lowest that the authors' script (gkevinyen5418/LoRA-RITE) tries on "
            "Gemma-2B: 2e-4, beside 5e-4 and 1e-3; else LoRA's.",
        ),
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as LoRA's, with the optimizer."""
        from tlora.adapter.rite import make_rite

        prepared = super().prepare(model, options, batches, plan)
        prepared.optimizer = partial(make_rite, eps=options.eps)
        return prepared
