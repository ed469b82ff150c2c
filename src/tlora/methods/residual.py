"""What the methods share that start from a part of W and leave the rest of it in the base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import Tensor

    from tlora.calibration.weights import Target

    Start = dict[str, tuple[Tensor, Tensor]]


class ResidualLora(ABC):
    """y = (W - s B_0 A_0) x + s B A x, with A and B starting at A_0 and B_0; s = lora_alpha / r.

    A subclass says what A_0 and B_0 are. At the start this is W x up to rounding. A resumed run
    takes A_0 and B_0 from the run's folder. The saved adapter, of rank 2 r, fits the original W.
    """

    options: ClassVar[type] = LoraOptions
    traits: ClassVar[Traits]
    taken: ClassVar[int] = 1
    """Singular components of a module's matrix that A_0 and B_0 need, in multiples of r."""

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Find A_0 and B_0, unless ``plan`` holds them; wrap ``model``, take s B_0 A_0 out of W.

        Raises:
            ConfigError: a target cannot give the ranks away (too small, quantized, shared).
        """
        from peft import LoraConfig

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
            plan = InitialAdapter(self.start(model, targets, options, batches))
        adapted = attach_residual(model, targets, LoraConfig(**peft_fields(options)), plan)
        return Prepared(model=adapted, plan=plan, writer=partial(save_converted, adapted, plan))

    def trainable(self, model: torch.nn.Module, options: Any) -> int | None:
        """Return r sum_i (m_i + d_i)."""
        from tlora.adapter.stock import rows_and_columns

        return options.r * rows_and_columns(self.targets(model, options))

    def targets(self, model: torch.nn.Module, options: Any) -> list[Target]:
        """Return the modules to adapt, in the model's order."""
        from tlora.adapter.stock import targets_of

        return targets_of(model, options)

    @abstractmethod
    def start(
        self, model: torch.nn.Module, targets: list[Target], options: Any, batches: Batches
    ) -> Start:
        """Return A_0 (r x d) and B_0 (m x r) of each target; the model is only read."""


def start_all(targets: list[Target], config: LoraConfig) -> Start:
    """Return what PEFT's own initialisation makes of each target, one at a time."""
    from tqdm.auto import tqdm

    from tlora.adapter.initial import start_by_peft

    bar = tqdm(targets, desc="Initialising", unit=" modules", disable=None)
    return {target.name: start_by_peft(target, config) for target in bar}
