"""EDoRA: DoRA with a small trained matrix between two frozen singular factors of W."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.dora import Dora
from tlora.methods.learningrates import LearningRates
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class EDoraOptions(LoraOptions):
    """LoRA's options, and the initialization of the small matrix."""

    sigma: Annotated[float, at_least(0)] = 1e-5
    """Initial standard deviation of the entries of the trained r x r matrix."""


class EDora(Dora):
    """y = g * (W + s B R A) / ||W + s B R A|| x, norms of the rows; R (r x r) and the g train.

    B = U_r and A = S_r V_r^T of W = U S V^T are frozen; g starts at the row norms of W, and R at
    small random numbers, so the output equals the base's up to about sigma. As in DoRA, gradients
    do not pass the norm. The saved adapter is PEFT's DoRA with B R written out.

    Source: Nasiri and Garraghan, arXiv 2501.12067; the authors' code decides which factor holds
    S_r.
    """

    options: ClassVar[type] = EDoraOptions
    traits: ClassVar[Traits] = Traits(
        title="EDoRA: Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value"
        " Decomposition",
        arxiv="2501.12067",
        year=2025,
        formula="g (W + (alpha / r) B R A) / ||W + (alpha / r) B R A|| x, B A the first r singular"
        " components of W, frozen",
        trains=("lora_B.default.core", "lora_magnitude_vector"),
        parameters="r^2 + m",
        start="moved",
        saved="DoRA of rank r",
        learning_rates=LearningRates(
            tiny=5e-3,
            small=1e-3,
            large=2e-4,
            huge=1e-4,
            source="The authors' script for RoBERTa base (Hamid-Nasiri/EDoRA) tries 1e-4 to 5e-3;"
            " 1e-3 is among them. From a billion on LoRA's; extrapolated below 100 million.",
        ),
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as DoRA's, with B R in place of B. R is drawn from torch's global generator."""
        from tlora.adapter.freeze import FrozenACallback
        from tlora.adapter.initial import refuse_ranks
        from tlora.adapter.stock import targets_of
        from tlora.adapter.three_factors import make_core, save_written_out

        targets = targets_of(model, options)
        refuse_ranks(targets, options.r)
        adapted: Any = super().prepare(model, options, batches, plan).model
        make_core(adapted, targets, options.sigma)
        return Prepared(
            model=adapted,
            callbacks=[FrozenACallback()],
            writer=partial(save_written_out, adapted),
        )
