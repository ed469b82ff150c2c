"""Shared by methods that start from a part of W and leave the rest of it in the base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tlora.calibration.weights import Target

    Start = Callable[[Target], tuple[Tensor, Tensor]]


class ResidualLora(ABC):
    """y = (W - s B_0 A_0) x + s B A x, with A and B starting at A_0 and B_0; s = lora_alpha / r.

    A subclass defines A_0 and B_0. At the start the output is W x up to rounding. A resumed run
    reads A_0 and B_0 from the run's folder. The saved adapter, of rank 2 r, fits the original W.
    """

    options: ClassVar[type] = LoraOptions
    traits: ClassVar[Traits]
    taken: ClassVar[int] = 1
    """Singular components of a module's matrix that A_0 and B_0 need, in multiples of r."""

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Compute A_0 and B_0, unless ``plan`` holds them; wrap ``model``; store W - s B_0 A_0."""
        from peft import LoraConfig
        from tqdm.auto import tqdm

        from tlora.adapter.initial import (
            InitialAdapter,
            attach_residual,
            refuse_unfit,
            save_converted,
        )
        from tlora.methods.lora import peft_fields

        targets = self.targets(model, options)
        refuse_unfit(model, targets, self.taken * options.r)
        if plan is None:
            start = self.start(model, targets, options, batches)
            bar = tqdm(targets, desc="Initializing", unit=" modules", disable=None)
            plan = InitialAdapter({target.name: start(target) for target in bar})
        config = LoraConfig(**peft_fields(options, LoraConfig))
        adapted = attach_residual(model, targets, config, plan)
        return Prepared(model=adapted, plan=plan, writer=partial(save_converted, adapted, plan))

    def targets(self, model: torch.nn.Module, options: Any) -> list[Target]:
        """Return the modules to adapt, in the model's order."""
        from tlora.adapter.stock import targets_of

        return targets_of(model, options)

    @abstractmethod
    def start(
        self, model: torch.nn.Module, targets: list[Target], options: Any, batches: Batches
    ) -> Start:
        """Return a function that computes A_0 (r x d) and B_0 (m x r) of a target."""
