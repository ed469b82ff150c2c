"""The default learning rate of each method.

TRL's and transformers' own defaults (2e-5, 5e-5) suit full fine-tuning of large models; with them
an adapter on a small model hardly changes. Instead each method declares learning rates by the size
of the base model. They come from published practice and never exceed it where it exists, which is
from a billion parameters on. They are a starting point, tuned for no task.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMALL, LARGE, HUGE = 100_000_000, 1_000_000_000, 20_000_000_000
"""Size of the base model, in parameters, where the next learning rate starts."""
HIGH_RANK = 64
_OF_ADAPTERS = ("lora_", "ranknum", ".modules_to_save.", "prompt_encoder")
"""Parts of the names of modules that PEFT adds to a model, besides the prefixes of its types."""


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """A method's default learning rates, equal for every kind of task."""

    tiny: float
    """Below 100 million parameters."""
    small: float
    """From 100 million parameters on."""
    large: float
    """From a billion parameters on."""
    huge: float | None = None
    """From 20 billion parameters on, if different."""
    high_rank: float | None = None
    """From a billion parameters on with ranks of at least 64, if different."""
    source: str
    """Where they were published, and which are extrapolated."""

    def of(self, parameters: int, rank: int | None = None) -> float:
        """Return the learning rate for a base model with this number of parameters.

        Args:
            parameters: parameters of the base model.
            rank: r of the adapter; None without one.
        """
        if parameters < SMALL:
            return self.tiny
        if parameters < LARGE:
            return self.small
        large = self.huge if self.huge is not None and parameters >= HUGE else self.large
        high = self.high_rank if rank is not None and rank >= HIGH_RANK else None
        return large if high is None else min(large, high)

    def words(self) -> str:
        """Return the learning rates and their sizes of model, for the help."""
        huge = "" if self.huge is None else f", {self.huge:g} from 20 billion"
        high = "" if self.high_rank is None else f", {self.high_rank:g} at ranks from {HIGH_RANK}"
        return (
            f"{self.tiny:g} for models below 100 million parameters, {self.small:g} from there,"
            f" {self.large:g} from 1 billion{huge}{high}"
        )


_BELOW = (
    " Below a billion: LoRA's scripts for RoBERTa base (microsoft/LoRA), 4e-4 and 5e-4. Below 100"
    " million: extrapolated; half of what the rule for Llama that goes with `LoRA Without Regret`"
    " (Thinking Machines, 2025), 5e-4 (2000 / width)^0.78, gives at a width of 128."
)

LORA_RATES = LearningRates(
    tiny=2e-3,
    small=5e-4,
    large=2e-4,
    huge=1e-4,
    source="QLoRA's code (artidoro/qlora): 2e-4, and 1e-4 for models larger than 13B." + _BELOW,
)
"""For LoRA, and relatives whose update starts at zero with its scale.

EVA's code (ml-jku/EVA) has 5e-4 for models of 7B to 9B; LoRA's rates stay below it.
"""

RESIDUAL_RATES = LearningRates(
    tiny=5e-4,
    small=1e-4,
    large=2e-5,
    source="The scripts of PiSSA (GraphPKU/PiSSA) and LoRA-GA (Outsider565/LoRA-GA) for Llama-2-7B:"
    " 2e-5, as PEFT's example of CorDA; LoRA-GA's for T5-base: 1e-4. Extrapolated below 100"
    " million.",
)
"""For methods whose A and B start from a part of W, so that the first steps change it more."""


def default_learning_rate(config: Any, model: torch.nn.Module, method: str = "tlora") -> float:
    """Return the default learning rate of `tlora train` for this adapter.

    It follows published practice for the size of the model and is not tuned for any task.

    Args:
        config: the method's options, a `TLoraConfig` for the default method.
        model: the base model, adapted or not; it may be quantized, or on `meta`.
        method: the method's name; see `tlora list methods`.

    Raises:
        ConfigError: there is no such method.
    """
    from tlora.registry import METHODS

    rates: LearningRates = METHODS.load(method).traits.learning_rates
    return rates.of(base_parameters(model), getattr(config, "r", None))


def base_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters of a base model, without an adapter on it.

    Weights stored as integers (4 and 8 bit) count as the matrices that they represent.
    """
    mapping = sys.modules.get("peft.mapping")
    prefixes = mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values() if mapping else ()
    added = (*_OF_ADAPTERS, *(f".{prefix}" for prefix in prefixes))
    seen: set[int] = set()
    count = 0
    for name, module in model.named_modules():
        if any(part in name for part in added):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            packed = not parameter.is_floating_point() and None not in sizes
            count += sizes[0] * sizes[1] if packed else parameter.numel()  # type: ignore[operator]
    return count
