"""Astra: LoRA that starts from W's part along the main directions of its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tlora.methods.base import Batches, Samples, Traits
from tlora.methods.learningrates import RESIDUAL_RATES
from tlora.methods.options import LoraOptions
from tlora.methods.residual import ResidualLora

End = Literal["largest", "smallest"]


@dataclass(kw_only=True)
class AstraOptions(LoraOptions):
    """LoRA's options, and the choice of starting directions."""

    eigenvalues: End = "largest"
    """Use the directions of the r largest eigenvalues, as the authors do, or of the smallest."""


class Astra(ResidualLora):
    """Y^T Y = Q L Q^T of the module's outputs Y: B_0 = Q_r, A_0 = Q_r^T W.

    Y has a row for every real token of the calibration samples and includes the module's bias. A
    and B train; the base keeps W - s B_0 A_0. "Tail" in the name refers to the end of
    `torch.linalg.eigh`'s ascending order: Q_r are the eigenvectors of the r largest eigenvalues.

    Source: Liu et al., arXiv 2602.19111; LyoAI/Astra, and the authors' text for PEFT.
    """

    options: ClassVar[type] = AstraOptions
    traits: ClassVar[Traits] = Traits(
        title="Astra: Activation-Space Tail-Eigenvector Low-Rank Adaptation of Large Language"
        " Models",
        arxiv="2602.19111",
        year=2026,
        formula="(W - s B0 A0) x + s B A x, B0 A0 = Q_r Q_r^T W, Q_r eigenvectors of Y^T Y",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="rounding",
        saved="LoRA of rank 2 r",
        learning_rates=RESIDUAL_RATES,
        changes_base=True,
        reads="inputs",
        pools=True,
        source="tlora",
    )

    def start(self, model: Any, targets: Any, options: AstraOptions, batches: Batches) -> Any:
        """Measure Y^T Y by forward passes, and start from the corresponding part of each weight."""
        import torch

        from tlora.adapter.stock import calibration_config
        from tlora.calibration.outputs import output_moments
        from tlora.calibration.weights import dense_weight
        from tlora.errors import CalibrationError

        samples = Samples.of(batches)
        moments = output_moments(
            model, samples.batches, calibration_config(options), samples.skip_bad_samples
        )

        def part(target: Any) -> Any:
            moment = moments.pop(target.name, None)
            if moment is None or moment.tokens == 0:
                raise CalibrationError(
                    f"{target.name}: no calibration sample reaches it, so Astra has no "
                    "outputs for it; exclude it by `exclude_modules`."
                )
            _, vectors = torch.linalg.eigh(moment.uncentered())
            end = slice(-options.r, None) if options.eigenvalues == "largest" else slice(options.r)
            b, weight = vectors[:, end], dense_weight(target)
            return b.T.to(weight) @ weight, b.to(weight)

        return part
