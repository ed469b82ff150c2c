"""QA-LoRA: LoRA on the means of input groups, which merges into a quantizer's zero points."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.lora import Lora
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class QaLoraOptions(LoraOptions):
    """LoRA's options, and the size of a group."""

    group_size: Annotated[int, at_least(1)] = 32
    """Neighboring inputs that share a column of A: the quantizer's group size; must divide d."""


class QaLora(Lora):
    """y = W x + (lora_alpha / r) B A pool(x): pool averages each `group_size` neighboring inputs.

    A (r x d / group_size) and B train. The update has one value per row and group, like the zero
    points of a quantizer with groups along the inputs, so it can be added to them. The saved
    adapter is a plain LoRA whose A repeats each column over its group, divided by the group size.

    Source: Xu et al., arXiv 2309.14717, section 3, and the authors' code.
    """

    options: ClassVar[type] = QaLoraOptions
    traits: ClassVar[Traits] = Traits(
        title="QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models",
        arxiv="2309.14717",
        year=2023,
        formula="W x + (alpha / r) B A pool(x), pool: means of groups of inputs",
        trains=("lora_A.default.grouped", "lora_B"),
        parameters="r (m + d / group)",
        start="identical",
        plain=False,
        source="tlora",
        learning_rates=LearningRates(
            tiny=2e-3,
            small=5e-4,
            large=2e-4,
            huge=1e-4,
            source="The default of the authors' script (yuhuixu1993/qa-lora): 2e-4. Below a billion"
            " LoRA's, from 20 billion on half.",
        ),
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as LoRA's, with A on groups. A is drawn from torch's global generator."""
        from tlora.adapter.stock import targets_of
        from tlora.adapter.three_factors import make_grouped, save_written_out
        from tlora.errors import ConfigError

        size = options.group_size
        if odd := [t for t in targets_of(model, options) if t.d_in % size]:
            raise ConfigError(
                f"`group_size` is {size}, which does not divide the {odd[0].d_in} inputs of"
                f" {odd[0].name}; give a divisor, or exclude the module.",
                where="adapter",
            )
        adapted: Any = super().prepare(model, options, batches, plan).model
        make_grouped(adapted, size)
        return Prepared(model=adapted, writer=partial(save_written_out, adapted))
