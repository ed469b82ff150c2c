"""LoRA-GA: LoRA whose first step is close to full fine-tuning's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tlora.checks import at_least
from tlora.methods.base import Batches, Traits
from tlora.methods.learningrates import RESIDUAL_RATES
from tlora.methods.options import LoraOptions
from tlora.methods.residual import ResidualLora

Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
Scale = Literal["stable", "weight_svd", "gd_scale", "unit", "paper"]


@dataclass(kw_only=True)
class LoraGaOptions(LoraOptions):
    """LoRA's options, and PEFT's options of LoRA-GA."""

    direction: Direction = "ArB2r"
    """Which of the gradient's 2 r leading singular vectors go to A and which to B."""
    init_scale: Scale = "stable"
    """How A_0 and B_0 are scaled: PEFT's `scale`, or "paper" for the paper's scale."""
    stable_gamma: Annotated[int, at_least(1)] = 16
    """For the scales "stable" and "paper", which multiply by m^(1/4) / stable_gamma^(1/2)."""


class LoraGa(ResidualLora):
    """G = dL/dW = U S V^T: A_0 = V_(1..r)^T, B_0 = c U_(r+1..2r) S_(r+1..2r).

    c = m^(1/4) / gamma^(1/2), and G is the mean of the batches' gradients at the start. A and B
    train; the base keeps W - s B_0 A_0. PEFT does the estimate and the initialization, by a
    randomized SVD of G. PEFT estimates in training mode; here dropout is off, as in every
    calibration. The gradients of all targets are in memory at once.

    The paper and its authors' code have A_0 = c V_(1..r)^T and B_0 = c U_(r+1..2r), without S. With
    S, PEFT's B_0 is nearly zero for small gradients; `init_scale` "paper" avoids this.

    Source: Wang et al., arXiv 2407.05000, sections 3.2 and 3.3; PEFT's `lora_ga_init`.
    """

    options: ClassVar[type] = LoraGaOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        arxiv="2407.05000",
        year=2024,
        formula="(W - s B0 A0) x + s B A x, A0 and B0 singular vectors of the gradient of W",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="rounding",
        saved="LoRA of rank 2 r",
        learning_rates=RESIDUAL_RATES,
        changes_base=True,
        reads="gradients",
    )
    taken: ClassVar[int] = 2

    def start(self, model: Any, targets: Any, options: LoraGaOptions, batches: Batches) -> Any:
        """Measure G by one forward and backward pass per batch, and start from its parts."""
        from peft import LoraConfig
        from peft.tuners.lora.config import LoraGAConfig
        from torch.nn.functional import normalize

        from tlora.adapter.gradients import gradients_by_peft
        from tlora.adapter.initial import start_by_peft
        from tlora.adapter.stock import exact

        config = LoraConfig(
            r=options.r,
            lora_alpha=options.lora_alpha,
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(
                direction=options.direction,
                scale="unit" if options.init_scale == "paper" else options.init_scale,
                stable_gamma=options.stable_gamma,
            ),
            **exact(model, targets),
        )
        config.fan_in_fan_out = False  # plain copies are initialized
        gradients = gradients_by_peft(model, targets, config, batches)

        def part(target: Any) -> Any:
            gradient = gradients.pop(target.name)
            a, b = start_by_peft(target, config, _peft_loraga_grad=gradient)
            if options.init_scale != "paper":
                return a, b
            # From V^T (r x d) and U S (m x r): c V^T and c U.
            scale = len(b) ** 0.25 / options.stable_gamma**0.5
            return scale * a, scale * normalize(b, dim=0)

        return part
