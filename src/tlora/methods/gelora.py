"""GeLoRA: ranks from the growth of the hidden states' dimension over a block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Samples, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch

    from tlora.adapter.initial import InitialAdapter


class GeLora:
    """y = W x + s B A x with r_i = max(d_(i+1) - d_i, 0) + 1 for the modules of block i.

    d_i and d_(i+1) are the intrinsic dimensions, by TwoNN, of the block's input and output hidden
    states. s = lora_alpha / r is the same for every rank. A and B start and train as in LoRA. A
    module outside all blocks (a pooler) has rank r. A resumed run reads the ranks and A from its
    folder.

    Our choices: a sample is one point, the mean of the hidden states of its real tokens, and the
    growth is
    rounded up. With n samples the estimate has a deviation of about d / sqrt(n).

    Source: Ed-dib et al., arXiv 2412.09250; Facco et al., Scientific Reports 7, 12140 (2017).
    """

    options: ClassVar[type] = LoraOptions
    traits: ClassVar[Traits] = Traits(
        title="GeLoRA: Geometric Adaptive Ranks For Efficient LoRA Fine-tuning",
        arxiv="2412.09250",
        year=2024,
        formula="W x + (alpha / r) B A x, r_i = max(d_(i+1) - d_i, 0) + 1 from the dimensions of"
        " the hidden states",
        trains=("lora_A", "lora_B"),
        parameters="r_i (m + d)",
        start="identical",
        saved="LoRA of rank r_i",
        learning_rates=LORA_RATES,
        reads="inputs",
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Measure the dimensions, unless ``plan`` holds the adapter; wrap ``model``."""
        from peft import LoraConfig

        from tlora.adapter.initial import attach_initial
        from tlora.adapter.stock import targets_of
        from tlora.methods.lora import peft_fields

        targets = targets_of(model, options)
        if plan is None:
            plan = self._start(model, targets, options, batches)
        config = LoraConfig(**peft_fields(options, LoraConfig))
        adapted = attach_initial(model, targets, config, plan, scale=options.scale)
        return Prepared(model=adapted, plan=plan)

    def _start(self, model: Any, targets: Any, options: Any, batches: Batches) -> InitialAdapter:
        from tlora.adapter.initial import InitialAdapter, random_start
        from tlora.calibration.hidden_states import block_dimensions, block_of

        found = block_dimensions(model, targets, Samples.of(batches).batches)
        modules = {}
        for target in targets:
            rank, block = options.r, block_of(target.name)
            if block is not None:
                before, after = found[block]
                rank = math.ceil(max(after - before, 0)) + 1
            modules[target.name] = random_start(target, rank)
        return InitialAdapter(modules)
