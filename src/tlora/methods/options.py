"""Options shared by methods: base records for a method's own record.

Field names and meanings follow PEFT where PEFT has them. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tlora.checks import POSITIVE, PROBABILITY, Pattern, Record, at_least
from tlora.config import Bias, TaskType, target_faults


@dataclass(kw_only=True)
class MethodOptions(Record):
    """Options of every method.

    Raises:
        ConfigError: an option is unknown (with a suggestion) or out of range; all faults are
            reported.
    """

    where: ClassVar[str] = "adapter"
    noun: ClassVar[str] = "option"

    task_type: TaskType | None = None
    """PEFT's task type; by default the task's."""

    @property
    def own_optimizer(self) -> bool:
        """Whether the method makes its own optimizer with these options."""
        return False


@dataclass(kw_only=True)
class AdapterOptions(MethodOptions):
    """Options of every adapter."""

    lora_dropout: Annotated[float, PROBABILITY] = 0.0
    """Dropout on the adapter's input during training."""
    bias: Bias = "none"
    """Which biases train: "none", "all" or "lora_only"."""
    modules_to_save: list[Pattern] | None = None
    """Modules trained in full and saved with the adapter (a new classifier head)."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose rows of the embedding train: ids, or ids by the layer's name. Rows of a tied
    head follow. `tokens.add` sets it for the tokens it adds."""
    ensure_weight_tying: bool = False
    """Keep the head tied to an embedding that trains by `modules_to_save`."""


@dataclass(kw_only=True)
class Targeted(AdapterOptions):
    """Options of an adapter on modules that the user chooses; defaults as in `TLoraConfig`."""

    target_modules: Pattern | list[str] | None = "all-linear"
    """Modules to adapt: a list of names or suffixes, a regex, "all-linear", or None for PEFT's
    default of the architecture."""
    exclude_modules: Pattern | list[str] | None = None
    """Modules to exclude."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        yield from super().relations()
        yield from target_faults(self)


@dataclass(kw_only=True)
class Scaled(AdapterOptions):
    """Options of an adapter with one rank and one scale."""

    r: Annotated[int, at_least(1)] = 8
    """Rank of every module."""
    lora_alpha: Annotated[float, POSITIVE] = 8
    """The adapter's output is multiplied by lora_alpha / r."""

    @property
    def scale(self) -> float:
        """s, the factor of the adapter's output."""
        return self.lora_alpha / self.r


@dataclass(kw_only=True)
class LoraOptions(Targeted, Scaled):
    """LoRA's options, which most of its relatives use unchanged."""
