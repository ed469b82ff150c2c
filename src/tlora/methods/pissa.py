"""PiSSA: LoRA that starts from the principal singular components of W."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from tlora.checks import at_least
from tlora.methods.base import Batches, Traits
from tlora.methods.learningrates import RESIDUAL_RATES
from tlora.methods.options import LoraOptions
from tlora.methods.residual import ResidualLora


@dataclass(kw_only=True)
class PissaOptions(LoraOptions):
    """LoRA's options, and the SVD that computes the components."""

    niter: Annotated[int, at_least(0)] | None = None
    """Subspace iterations of a fast randomized SVD (PEFT: pissa_niter_N); None: the full SVD."""


class Pissa(ResidualLora):
    """W = U S V^T: B_0 = U_r (S_r / s)^(1/2), A_0 = (S_r / s)^(1/2) V_r^T, the leading r.

    A and B train; the base keeps the minor components, W - s B_0 A_0. PEFT's initialization.

    Source: Meng et al., arXiv 2404.02948, section 3.
    """

    options: ClassVar[type] = PissaOptions
    traits: ClassVar[Traits] = Traits(
        title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language"
        " Models",
        arxiv="2404.02948",
        year=2024,
        formula="(W - s B0 A0) x + s B A x, s B0 A0 the leading r singular components of W",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="rounding",
        saved="LoRA of rank 2 r",
        learning_rates=RESIDUAL_RATES,
        changes_base=True,
    )

    def start(self, model: Any, targets: Any, options: PissaOptions, batches: Batches) -> Any:
        """Start from the leading components of each weight; no batch is read."""
        from peft import LoraConfig

        from tlora.adapter.initial import start_by_peft

        how = "pissa" if options.niter is None else f"pissa_niter_{options.niter}"
        config = LoraConfig(r=options.r, lora_alpha=options.lora_alpha, init_lora_weights=how)
        return partial(start_by_peft, config=config)
