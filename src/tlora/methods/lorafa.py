"""LoRA-FA: LoRA with a random frozen A; the control for every other frozen A."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.lora import Lora
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class LoraFaOptions(LoraOptions):
    """LoRA's options, and the choice of optimizer for B."""

    projected: bool = False
    """Step with (1/s^2) G_B (A A^T)^(-1) instead of B's gradient G_B, by PEFT's own AdamW for
    LoRA-FA; it uses the trainer's `learning_rate`, schedule and `weight_decay`."""

    @property
    def own_optimizer(self) -> bool:
        """See `MethodOptions`."""
        return self.projected


class LoraFa(Lora):
    """y = W x + (lora_alpha / r) B A x with A random and frozen; only B trains.

    The plain reading of the paper, with the trainer's own optimizer. PEFT's LoRA-FA is an
    optimizer: it also freezes A (by `requires_grad`, which PEFT's own switches undo; here A is
    frozen as in `tlora.adapter.freeze`), and steps B with the gradient closest to full
    fine-tuning's, computed in bfloat16 if the machine supports it: `projected` turns that on.

    Source: Zhang et al., arXiv 2308.03303, section 3.
    """

    options: ClassVar[type] = LoraFaOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
        arxiv="2308.03303",
        year=2023,
        formula="W x + (alpha / r) B A x, A frozen",
        trains=("lora_B",),
        parameters="r m",
        start="identical",
        learning_rates=LORA_RATES,
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as LoRA's, with A frozen and guarded."""
        from tlora.adapter.freeze import FrozenACallback, freeze_a

        prepared = super().prepare(model, options, batches, plan)
        freeze_a(prepared.model)
        prepared.callbacks.append(FrozenACallback())
        if options.projected:
            prepared.optimizer = partial(_projected, options=options)
        return prepared


def _projected(
    model: torch.nn.Module, arguments: Any, options: LoraFaOptions
) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(
        model,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
