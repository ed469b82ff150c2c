"""LoRA+: LoRA whose B learns faster than its A."""

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


@dataclass(kw_only=True)
class LoraPlusOptions(LoraOptions):
    """LoRA's options, and B's learning rate relative to A's."""

    lr_ratio: Annotated[float, POSITIVE] = 16.0
    """B's learning rate over A's; A's is the trainer's `learning_rate`."""

    @property
    def own_optimizer(self) -> bool:
        """See `MethodOptions`."""
        return True


class LoraPlus(Lora):
    """LoRA whose B has lr_ratio times the learning rate of A, by PEFT's optimizer groups.

    The trainer's arguments name the optimizer, and its schedule scales both learning rates. In
    PEFT, one-dimensional parameters (a new head's bias) have B's learning rate and no weight decay.

    Source: Hayou et al., arXiv 2402.12354; 16 is the ratio that its experiments recommend.
    """

    options: ClassVar[type] = LoraPlusOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRA+: Efficient Low Rank Adaptation of Large Models",
        arxiv="2402.12354",
        year=2024,
        formula="W x + (alpha / r) B A x, rate of B = lr_ratio x rate of A",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="identical",
        learning_rates=LearningRates(
            tiny=3e-4,
            small=1e-4,
            large=2e-5,
            source="The rate of A; that of B is lr_ratio times as high. The authors' code "
            "(nikhil-ghosh-berkeley/loraplus): 1e-4 at a ratio of 20 on RoBERTa "
            "base, 5e-5 at 20 in its example; lower from a billion on, extrapolated "
            "below 100 million.",
        ),
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as LoRA's, with an optimizer of two learning rates."""
        prepared = super().prepare(model, options, batches, plan)
        prepared.optimizer = partial(_optimizer, ratio=options.lr_ratio)
        return prepared


def _optimizer(model: torch.nn.Module, arguments: Any, ratio: float) -> torch.optim.Optimizer:
    """Make the optimizer that ``arguments`` names, with PEFT's groups."""
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return create_loraplus_optimizer(
        model,
        kind,
        lr=options.pop("lr"),
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )
