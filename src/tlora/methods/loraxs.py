"""LoRA-XS: a small trained matrix between frozen singular vectors of W."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE, at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.options import Targeted

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class LoraXsOptions(Targeted):
    """LoRA's options, with a higher rank; r^2 parameters train."""

    r: Annotated[int, at_least(1)] = 32
    """Rank of every module; r^2 parameters of it train."""
    lora_alpha: Annotated[float, POSITIVE] = 32
    """The adapter's output is multiplied by lora_alpha / r."""
    sigma: Annotated[float, at_least(0)] = 1e-5
    """Initial standard deviation of R; 0 starts at W x."""


class LoraXs:
    """y = W x + (lora_alpha / r) U_r R S_r V_r^T x, of W = U S V^T; only R (r x r) trains.

    U_r S_r V_r^T are the first r singular components. R starts at normal numbers with deviation
    `sigma`, so the output deviates from the base's accordingly. The saved adapter is a plain LoRA,
    A = S_r V_r^T and B = U_r R.

    Source: Balazy et al., arXiv 2405.17604, section 3, and the authors' code.
    """

    options: ClassVar[type] = LoraXsOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
        arxiv="2405.17604",
        year=2024,
        formula="W x + (alpha / r) U_r R S_r V_r^T x, W = U S V^T frozen",
        trains=("lora_B.default.core",),
        parameters="r^2",
        start="moved",
        source="tlora",
        learning_rates=LearningRates(
            tiny=4e-3,
            small=1e-3,
            large=1e-3,
            huge=1e-4,
            source="The authors' scripts (MohammadrezaBanaei/LoRA-XS): 2e-3 for Llama-3-8B, 4e-3"
            " for Mistral-7B, up to 1e-3 for RoBERTa-large. From 20 billion on LoRA's, below 100"
            " million extrapolated.",
        ),
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Wrap ``model``. R is drawn from torch's global generator; no batch is read."""
        from peft import LoraConfig

        from tlora.adapter.freeze import FrozenACallback
        from tlora.adapter.initial import refuse_ranks
        from tlora.adapter.stock import targets_of, wrap_exactly
        from tlora.adapter.three_factors import make_core, save_written_out
        from tlora.methods.lora import peft_fields

        targets = targets_of(model, options)
        refuse_ranks(targets, options.r)
        adapted = wrap_exactly(model, targets, LoraConfig(**peft_fields(options, LoraConfig)))
        make_core(adapted, targets, options.sigma)
        return Prepared(
            model=adapted,
            callbacks=[FrozenACallback()],
            writer=partial(save_written_out, adapted),
        )
