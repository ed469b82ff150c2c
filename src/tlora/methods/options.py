"""The options that methods share: records to build a method's own record from.

Field names and meanings are PEFT's where PEFT has one. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tlora.config import Bias, TaskType
from tlora.errors import ConfigError, unknown_names


@dataclass(kw_only=True)
class MethodOptions:
    """What every method has.

    Raises:
        ConfigError: an option is unknown (with a suggestion) or out of range; all faults at once.
    """

    task_type: TaskType | None = None
    """PEFT's task type; by default that of the task."""

    def __new__(cls, *args: Any, **values: Any) -> Any:
        # Before __init__, so that an unknown option meets our sentence and not a bare TypeError.
        known = [field.name for field in dataclasses.fields(cls)]
        if faults := unknown_names(values, known, "option"):
            raise ConfigError(faults, where="adapter")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise ConfigError(faults, where="adapter")

    def _faults(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range; a subclass adds its own."""
        yield from self._choice("task_type", Literal[TaskType, None])

    def _whole(self, name: str, low: int) -> Iterator[str]:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            yield f"`{name}` is {value!r}; give a whole number, {low} or more."

    def _positive(self, name: str) -> Iterator[str]:
        value = getattr(self, name)
        if not _is_number(value) or not 0 < value < math.inf:
            yield f"`{name}` is {value!r}; give a positive number."

    def _switch(self, name: str) -> Iterator[str]:
        if not isinstance(value := getattr(self, name), bool):
            yield f"`{name}` is {value!r}; give true or false."

    def _choice(self, name: str, kind: Any) -> Iterator[str]:
        if (value := getattr(self, name)) not in get_args(kind):
            options = ", ".join(map(repr, get_args(kind)))
            yield f"`{name}` is {value!r}; choose one of {options}."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(kw_only=True)
class AdapterOptions(MethodOptions):
    """What every adapter has."""

    lora_dropout: float = 0.0
    """Dropout on the adapter's input while training."""
    bias: Bias = "none"
    """Which biases train: "none", "all" or "lora_only"."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter (a new classifier head)."""

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        dropout = self.lora_dropout
        if not _is_number(dropout) or not 0 <= dropout < 1:
            yield f"`lora_dropout` is {dropout!r}; give a probability in [0, 1)."
        yield from self._choice("bias", Bias)


@dataclass(kw_only=True)
class Targeted(AdapterOptions):
    """An adapter on modules that the user chooses; the choice starts as in `TLoraConfig`."""

    target_modules: str | list[str] | None = "all-linear"
    """Modules to adapt: a list of names or suffixes, a regex, "all-linear", or None for PEFT's
    default of the architecture."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out."""


@dataclass(kw_only=True)
class Scaled(AdapterOptions):
    """An adapter of one rank and one scale."""

    r: int = 8
    """Rank of every module."""
    lora_alpha: float = 8
    """The adapter's output is multiplied by lora_alpha / r."""

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        yield from self._whole("r", 1)
        yield from self._positive("lora_alpha")

    @property
    def scale(self) -> float:
        """s, what the adapter's output is multiplied by."""
        return self.lora_alpha / self.r


@dataclass(kw_only=True)
class LoraOptions(Targeted, Scaled):
    """LoRA's options, which most of its relatives take as they are."""
