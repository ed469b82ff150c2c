"""Tri-Matrix LoRA: two random matrices with a small trained one between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE, at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.options import Targeted

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class TriMatrixOptions(Targeted):
    """A rank and a scale; the scale trains."""

    r: Annotated[int, at_least(1)] = 32
    """Rank of every module; r^2 + 1 parameters of it train."""
    scale: Annotated[float, POSITIVE] = 1.0
    """Initial value of each module's trained scale a."""


class TriMatrix:
    """y = W x + a P Q R x: P (m x r) and R (r x d) random and fixed, Q (r x r) and a trained.

    Q starts at zero, a at `scale`; each module has its own a. The saved adapter is a plain LoRA, A
    = R and B = a P Q. This is not the task-aware method of the same name.

    Source: Islam, arXiv 2504.18735, section 3.
    """

    options: ClassVar[type] = TriMatrixOptions
    traits: ClassVar[Traits] = Traits(
        title="TLoRA: Tri-Matrix Low-Rank Adaptation of Large Language Models",
        arxiv="2504.18735",
        year=2025,
        formula="W x + a P Q R x, P and R random and fixed",
        trains=("lora_B.default.core", "lora_B.default.scale"),
        parameters="r^2 + 1",
        start="identical",
        learning_rates=LORA_RATES,
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Wrap ``model``. P and R are drawn from torch's global generator; no batch is read."""
        from peft import LoraConfig

        from tlora.adapter.freeze import FrozenACallback
        from tlora.adapter.stock import targets_of, wrap_exactly
        from tlora.adapter.three_factors import make_trimatrix, save_written_out
        from tlora.methods.lora import peft_fields

        config = LoraConfig(**peft_fields(options, LoraConfig), lora_alpha=options.r)
        adapted = wrap_exactly(model, targets_of(model, options), config)
        make_trimatrix(adapted, options.scale)
        return Prepared(
            model=adapted,
            callbacks=[FrozenACallback()],
            writer=partial(save_written_out, adapted),
        )
