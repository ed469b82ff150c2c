"""Stock LoRA of PEFT, the baseline: A random, B zero, both train, one rank and one scale."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch


class Lora:
    """y = W x + (lora_alpha / r) B A x, as in PEFT: A random, B zero, both train.

    Source: Hu et al., arXiv 2106.09685, section 4.
    """

    options: ClassVar[type] = LoraOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        year=2021,
        formula="W x + (alpha / r) B A x",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="identical",
        learning_rates=LORA_RATES,
    )
    fields: ClassVar[dict[str, Any]] = {}
    """LoraConfig fields that a relative of LoRA sets besides its options."""

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Wrap ``model`` by PEFT. A is drawn from torch's global generator; no batch is read."""
        from peft import LoraConfig

        from tlora.adapter.stock import targets_of, wrap_exactly

        config = LoraConfig(**peft_fields(options, LoraConfig), **self.fields)
        return Prepared(model=wrap_exactly(model, targets_of(model, options), config))


def peft_fields(options: Any, config: Any) -> dict[str, Any]:
    """Return the options that PEFT's class ``config`` has under the same name."""
    known = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in dataclasses.asdict(options).items() if name in known}
