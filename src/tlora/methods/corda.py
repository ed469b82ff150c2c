"""CorDA: LoRA that starts from W seen through the inputs of the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tlora.methods.base import Batches, Samples, Traits
from tlora.methods.learningrates import RESIDUAL_RATES
from tlora.methods.options import LoraOptions
from tlora.methods.residual import ResidualLora

Mode = Literal["ipm", "kpm"]


@dataclass(kw_only=True)
class CordaOptions(LoraOptions):
    """LoRA's options, and the choice of starting components."""

    corda_method: Mode = "ipm"
    """Use the components that matter most for the inputs ("ipm", instruction-previewed) or least
    ("kpm", knowledge-preserved: then calibrate on the knowledge to keep)."""


class Corda(ResidualLora):
    """W C = U S V^T: B_0 = U_r (S_r / s)^(1/2), A_0 = (S_r / s)^(1/2) V_r^T C^(-1).

    Uses the first r components, or the last. C is the uncentered second moment of the inputs, with
    0.01 of its mean diagonal added (more if it does not invert well). A and B train; the base keeps
    W - s B_0 A_0. The decomposition is PEFT's. C is ours, on the calibration batches: every real
    token counts once, while PEFT's own needs batches of one without padding and divides each by its
    largest entry.

    Source: Yang et al., arXiv 2406.05223, section 3.
    """

    options: ClassVar[type] = CordaOptions
    traits: ClassVar[Traits] = Traits(
        title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for"
        " Task-Aware Parameter-Efficient Fine-tuning",
        arxiv="2406.05223",
        year=2024,
        formula="(W - s B0 A0) x + s B A x, s B0 A0 = U_r S_r V_r^T C^-1 of W C = U S V^T",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="rounding",
        saved="LoRA of rank 2 r",
        learning_rates=RESIDUAL_RATES,
        changes_base=True,
        reads="inputs",
        pools=True,
    )

    def start(self, model: Any, targets: Any, options: CordaOptions, batches: Batches) -> Any:
        """Measure C by forward passes, and start from the corresponding part of each weight."""
        from tlora.adapter.initial import start_by_corda
        from tlora.adapter.stock import calibration_config
        from tlora.calibration.probe import calibrate
        from tlora.errors import CalibrationError

        samples = Samples.of(batches)
        stats = calibrate(model, samples.batches, calibration_config(options), **samples.reading)

        def part(target: Any) -> Any:
            measured = stats.modules[target.name]
            if measured.tokens == 0:
                raise CalibrationError(
                    f"{target.name}: no calibration sample reaches it, so CorDA has no inputs "
                    "for it; exclude it by `exclude_modules`."
                )
            return start_by_corda(target, options, measured.uncentered())

        return part
