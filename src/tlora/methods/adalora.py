"""AdaLoRA: ranks are pruned during training, by the importance of their triplets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE, Rule, at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.options import Targeted

if TYPE_CHECKING:
    import torch


_SMOOTHING = Rule("a number between 0 and 1", lambda value: 0 < value < 1)


@dataclass(kw_only=True)
class AdaLoraOptions(Targeted):
    """PEFT's names; the schedule is counted in optimizer steps."""

    init_r: Annotated[int, at_least(1)] = 12
    """Initial rank of every module."""
    target_r: Annotated[int, at_least(1)] = 8
    """Final mean rank of a module."""
    lora_alpha: Annotated[float, POSITIVE] = 8
    """The adapter's output is multiplied by lora_alpha / init_r."""
    tinit: Annotated[int, at_least(0)] = 0
    """Steps before pruning starts."""
    tfinal: Annotated[int, at_least(0)] = 0
    """Steps after pruning ends."""
    deltaT: Annotated[int, at_least(1)] = 1
    """Steps between prunings."""
    beta1: Annotated[float, _SMOOTHING] = 0.85
    """Smoothing of the importance scores."""
    beta2: Annotated[float, _SMOOTHING] = 0.85
    """Smoothing of their uncertainty."""
    orth_reg_weight: Annotated[float, at_least(0)] = 0.5
    """Weight of the orthogonality term of A and B in the training loss."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        yield from super().relations()
        if self.target_r >= self.init_r:
            yield f"`target_r` is {self.target_r!r}; give less than `init_r` ({self.init_r})."


class AdaLora:
    """y = W x + (lora_alpha / init_r) B E A x, E diagonal; least important entries of E are zeroed.

    Importance: |weight x gradient| of a triplet (a column of B, an entry of E, a row of A),
    smoothed, times its smoothed uncertainty. The ranks kept fall by a cubic schedule from init_r to
    target_r a module. `AdaLoraCallback` (`tlora.adapter.rank_pruning`) drives PEFT's
    implementation. The saved folder is PEFT's AdaLoRA without the pruned ranks.

    Source: Zhang et al., arXiv 2303.10512, section 3.
    """

    options: ClassVar[type] = AdaLoraOptions
    traits: ClassVar[Traits] = Traits(
        title="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        arxiv="2303.10512",
        year=2023,
        formula="W x + (alpha / init_r) B E A x, E diagonal and pruned",
        trains=("lora_A", "lora_B", "lora_E"),
        parameters="init_r (m + d + 1), pruned to a mean of target_r",
        start="identical",
        plain=False,
        saved="AdaLoRA",
        learning_rates=LearningRates(
            tiny=2e-3,
            small=5e-4,
            large=1e-4,
            source="The authors' scripts for DeBERTa-v3-base (QingruZhang/AdaLoRA): 5e-4 on MNLI,"
            " 8e-4 on CoLA, 1e-3 on SQuAD 2. From a billion on half of LoRA's, below 100 million"
            " LoRA's.",
        ),
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Wrap ``model``. A and B are drawn from torch's global generator; no batch is read."""
        from peft import AdaLoraConfig

        from tlora.adapter.rank_pruning import AdaLoraCallback, save_pruned
        from tlora.adapter.stock import refuse_stored, targets_of, wrap, wrap_exactly
        from tlora.calibration.language_model import language_model
        from tlora.methods.lora import peft_fields

        # TRL casts A, E and B to bfloat16, and PEFT leaves the inputs in float32.
        targets = targets_of(model, options)
        refuse_stored(
            targets,
            int8="PEFT's AdaLoRA does not run on these layers under TRL",
            hqq="PEFT's AdaLoRA does not adapt these layers",
        )
        # The trainer knows the number of steps; until then any number that fits the schedule works.
        steps = options.tinit + options.tfinal + 1
        config = AdaLoraConfig(**peft_fields(options, AdaLoraConfig), total_step=steps)
        multimodal = language_model(model) is not None
        adapted = wrap_exactly(model, targets, config) if multimodal else wrap(model, config)
        return Prepared(
            model=adapted,
            callbacks=[AdaLoraCallback(options.orth_reg_weight)],
            writer=partial(save_pruned, adapted, options.orth_reg_weight),
        )
