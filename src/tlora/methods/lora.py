"""Stock LoRA of PEFT, the baseline: A random, B zero, both train, one rank and one scale."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from tlora.config import Bias
from tlora.errors import ConfigError, unknown_names
from tlora.methods.base import Batches, Prepared

if TYPE_CHECKING:
    import torch

    from tlora.adapter.plan import AdapterPlan


@dataclass(kw_only=True)
class LoraOptions:
    """PEFT's names and meanings; `target_modules` starts at "all-linear", as in `TLoraConfig`.

    Raises:
        ConfigError: an option is unknown (with a suggestion) or out of range; all faults at once.
    """

    r: int = 8
    """Rank of every module."""
    lora_alpha: float = 8
    """The adapter's output is multiplied by lora_alpha / r."""
    target_modules: str | list[str] | None = "all-linear"
    """Modules to adapt: a list of names or suffixes, a regex, "all-linear", or None for PEFT's
    default of the architecture."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input while training."""
    bias: Bias = "none"
    """Which biases train: "none", "all" or "lora_only"."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter (a new classifier head)."""
    task_type: str | None = None
    """PEFT's task type; by default that of the task."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead."""

    def __new__(cls, *args: Any, **values: Any) -> LoraOptions:
        # Before __init__, so that an unknown option meets our sentence and not a bare TypeError.
        known = [field.name for field in dataclasses.fields(cls)]
        if faults := unknown_names(values, known, "option"):
            raise ConfigError(faults, where="lora")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        faults = []
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            faults.append(f"`r` is {self.r!r}; give a whole number, 1 or more.")
        if not isinstance(self.lora_alpha, (int, float)) or not 0 < self.lora_alpha < math.inf:
            faults.append(f"`lora_alpha` is {self.lora_alpha!r}; give a positive number.")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            faults.append(f"`lora_dropout` is {self.lora_dropout!r}; give a probability in [0, 1).")
        if self.bias not in get_args(Bias):
            options = ", ".join(map(repr, get_args(Bias)))
            faults.append(f"`bias` is {self.bias!r}; choose one of {options}.")
        if not isinstance(self.use_rslora, bool):
            faults.append(f"`use_rslora` is {self.use_rslora!r}; give true or false.")
        if faults:
            raise ConfigError(faults, where="lora")


class Lora:
    """y = W x + (lora_alpha / r) B A x (Hu et al., arXiv 2106.09685), as PEFT does it."""

    options = LoraOptions

    def prepare(
        self,
        model: torch.nn.Module,
        options: LoraOptions,
        batches: Batches,
        plan: AdapterPlan | None = None,
    ) -> Prepared:
        """Wrap ``model`` by PEFT. A is drawn from torch's global generator; no batch is read.

        Raises:
            ConfigError: PEFT does not find the target modules.
        """
        import peft

        config = peft.LoraConfig(**dataclasses.asdict(options))
        try:
            return Prepared(model=peft.get_peft_model(model, config))
        except ValueError as error:
            # PEFT names the modules it did not find.
            raise ConfigError(str(error), where="lora") from error
