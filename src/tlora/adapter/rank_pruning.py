"""Drives PEFT's AdaLoRA from a trainer, so that a resumed run equals an uninterrupted one.

PEFT prunes in `update_and_allocate`, which needs the gradients of the step just taken. On its own
it also writes the kept ranks into its config, so every checkpoint loses the pruned ranks, which may
come back later. Here the config gets the ranks only when the result is saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from tlora.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

# PEFT's smoothed importance scores, stored with each parameter's optimizer state in every
# checkpoint.
_SMOOTHED = ("exp_avg_ipt", "exp_avg_unc")


class AdaLoraCallback(TrainerCallback):
    """Calls PEFT's allocation after each optimizer step, and keeps its state in the checkpoints.

    The orthogonality term is added to the loss only in training, so evaluation reports the task's
    loss.

    Args:
        weight: of the orthogonality term.

    Raises:
        ConfigError: the run has too few steps for the schedule.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._pattern: dict[str, list[bool]] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the schedule at once, where the number of steps is given."""
        config = kwargs["model"].peft_config["default"]
        config.orth_reg_weight = 0.0
        if args.max_steps > 0:
            _check(config, args.max_steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the number of steps; in a resumed run, restore the state."""
        model = kwargs["model"]
        config = model.peft_config["default"]
        _check(config, state.max_steps)
        config.total_step = state.max_steps
        allocator = model.base_model.rankallocator
        for name, parameter in _adapter_parameters(model):
            kept = kwargs["optimizer"].state.get(parameter, {})
            for field in _SMOOTHED:
                if field in kept:
                    getattr(allocator, field)[name] = kept[field]
            if _SMOOTHED[0] in kept:
                allocator.ipt[name] = kept[_SMOOTHED[0]]  # only its presence matters
        if state.global_step >= config.total_step - config.tfinal:
            self._pattern = _kept_ranks(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the orthogonality term to the loss."""
        kwargs["model"].peft_config["default"].orth_reg_weight = self.weight

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune using the gradients of the step just taken."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):
            return  # overflow in half precision: there are no gradients
        config = model.peft_config["default"]
        config.rank_pattern = self._pattern
        model.base_model.update_and_allocate(state.global_step + 1)
        self._pattern, config.rank_pattern = config.rank_pattern, None
        allocator = model.base_model.rankallocator
        for name, parameter in _adapter_parameters(model):
            for field in _SMOOTHED:
                smoothed = getattr(allocator, field).get(name)
                if smoothed is not None:
                    optimizer.state[parameter][field] = smoothed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the orthogonality term from the loss before an evaluation."""
        kwargs["model"].peft_config["default"].orth_reg_weight = 0.0


def save_pruned(model: PeftModel, weight: float, folder: Path) -> None:
    """Write PEFT's AdaLoRA folder without the ranks whose entry of E is zero.

    Args:
        model: trained, or untrained (then every rank is kept).
        weight: of the orthogonality term, for the config.
        folder: where to write.
    """
    config: Any = model.peft_config["default"]
    pattern = _kept_ranks(model)
    before = config.rank_pattern, config.orth_reg_weight
    config.orth_reg_weight = weight
    config.rank_pattern = pattern if any(map(any, pattern.values())) else None
    try:
        with warnings.catch_warnings():
            # For modules that have lost all their ranks.
            warnings.filterwarnings("ignore", message=".*have invalid shape")
            model.save_pretrained(folder)
    finally:
        config.rank_pattern, config.orth_reg_weight = before


def _adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the scored entries, by the names that PEFT's allocator uses."""
    inner: Any = model
    for name, parameter in inner.base_model.model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            yield name, parameter


def _kept_ranks(model: nn.Module) -> dict[str, list[bool]]:
    """Return which entries of each E are nonzero, by PEFT's pattern names."""
    return {
        name: (parameter != 0).flatten().tolist()
        for name, parameter in _adapter_parameters(model)
        if "lora_E.default" in name
    }


def _check(config: Any, steps: int) -> None:
    # At its very last step before `tfinal` PEFT prunes by scores that it has never computed.
    if config.tinit + config.tfinal >= steps or steps - config.tfinal < 2:
        raise ConfigError(
            f"the run has {steps} steps, and `tinit` ({config.tinit}) and `tfinal` "
            f"({config.tfinal}) leave too few steps for pruning; lower them, or train "
            "for longer.",
            where="adapter",
        )
