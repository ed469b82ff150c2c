"""DyLoRA: each step trains the first b ranks, so that the adapter works at any rank up to r."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.lora import Lora
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class DyLoraOptions(LoraOptions):
    """LoRA's options, and the choice of trained ranks."""

    r_min: Annotated[int, at_least(1)] = 1
    """The smallest rank that is drawn; the largest is r."""
    frozen: bool = False
    """Train only the last rank of each step."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        yield from super().relations()
        if self.r_min > self.r:
            yield f"`r_min` is {self.r_min!r}; give at most `r` ({self.r})."


class DyLora(Lora):
    """y = W x + (lora_alpha / b) B[:, :b] A[:b] x, with b drawn uniformly from r_min..r each step.

    A and B start and train as in LoRA. Evaluation and the saved adapter have all r ranks, at
    lora_alpha / r; the first K ranks, at lora_alpha / K, are an adapter too, which `tlora export
    --max_rank K` writes. A rank skipped in a step has a zero gradient, so AdamW's momentum still
    moves it. With `frozen` only rank b gets a gradient, as in the authors' script for GLUE.

    Source: Valipour et al., arXiv 2210.07558, section 4; the authors' code (huawei-noah, DyLoRA).
    """

    options: ClassVar[type] = DyLoraOptions
    traits: ClassVar[Traits] = Traits(
        title="DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free"
        " Low-Rank Adaptation",
        arxiv="2210.07558",
        year=2022,
        formula="W x + (alpha / b) B[:, :b] A[:b] x, b drawn each step",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="identical",
        plain=False,
        learning_rates=LORA_RATES,
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Same as LoRA's, with a callback that draws b."""
        from tlora.adapter.nested import DrawRank, LeadingRanks, make_nested

        prepared = super().prepare(model, options, batches, plan)
        ranks = LeadingRanks(frozen=options.frozen)
        make_nested(prepared.model, ranks)
        return dataclasses.replace(
            prepared,
            callbacks=[DrawRank(ranks, options.r_min, options.r)],
            writer=partial(_save, prepared, options.r_min),
        )


def _save(prepared: Prepared, least: int, folder: Path) -> None:
    from tlora.adapter.nested import mark_nested

    prepared.save(folder)
    mark_nested(folder, least)
