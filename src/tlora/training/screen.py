"""Terminal output of a training: losses, speed, peak memory, time left.

On a terminal it is a progress bar; elsewhere, as in a batch job, one line per interval.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import ProgressCallback

from tlora.config import bytes_text
from tlora.training.peak_memory import PeakMemory

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

INTERVAL = 10.0
"""Minimum seconds between two lines."""


class ScreenCallback(ProgressCallback):
    """Shows the progress of a training; the run's log has every line.

    Args:
        memory: peak memory of the run's process.
        lines: whether to log lines instead of a bar.
        clock: returns seconds.
    """

    def __init__(
        self, memory: PeakMemory, lines: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._memory, self._lines, self._clock = memory, lines, clock
        self._tokens: Any = 0
        self._shown: dict[str, float] = {}
        self._start = self._step_end = self._line = clock()
        self._first_step = 0
        self._over = False

    def watch(self, trainer: Any) -> None:
        """Replace a trainer's own bar, if it has one, and count its tokens."""
        if trainer.pop_callback(ProgressCallback) is None:
            return
        trainer.add_callback(self)
        step, processes = trainer.training_step, trainer.args.world_size

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # A tensor on its device: adding to it does not synchronize; reading it does.
            self._tokens = self._tokens + processes * _tokens(inputs)
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the bar."""
        self._start = self._step_end = self._clock()
        self._line, self._first_step = self._start - INTERVAL, state.global_step
        if not self._lines:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._step_end = self._clock()
        if not self._lines:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar of an evaluation."""
        if not self._lines:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exclude the time of an evaluation from the training speed."""
        now = self._clock()
        self._start += now - self._step_end
        self._step_end = now
        super().on_evaluate(args, state, control, **kwargs)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the latest losses, on the bar or in a line."""
        found = logs or {}
        names = {"loss": "loss", "eval_loss": "eval loss", "learning_rate": "lr"}
        if "loss" not in self._shown and "train_loss" in found:  # fewer steps than `logging_steps`
            self._shown = {"loss": float(found["train_loss"])} | self._shown
        new = {said: float(found[name]) for name, said in names.items() if name in found}
        self._shown |= new
        if not state.is_world_process_zero or not new:
            return
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(", ".join(self._figures()))
        elif self._lines and not self._over and ("eval loss" in new or self._due(state)):
            self._line = self._clock()
            step, steps = state.global_step, max(1, state.max_steps)
            left = timedelta(seconds=round(self._seconds_left(state)))
            figures = ", ".join(self._figures())
            logger.info(
                "step %d/%d (%.0f%%): %s, %s left", step, steps, 100 * step / steps, figures, left
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar and log a summary."""
        if not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
        self._over = True
        steps = state.global_step - self._first_step
        seconds = timedelta(seconds=round(self._step_end - self._start))
        logger.info("trained %d steps in %s: %s", steps, seconds, ", ".join(self._figures()))

    def _due(self, state: Any) -> bool:
        last = state.global_step >= state.max_steps
        return last or self._clock() - self._line >= INTERVAL

    def _figures(self) -> list[str]:
        """Return losses, learning rate, speed and memory as words."""
        figures = [f"{name} {value:.4g}" for name, value in self._shown.items()]
        seconds = self._step_end - self._start
        if seconds > 0 and (tokens := int(self._tokens)):
            figures.append(f"{tokens / seconds:,.0f} tokens/s")
        return [*figures, f"peak memory {bytes_text(self._memory.so_far())}"]

    def _seconds_left(self, state: Any) -> float:
        done = state.global_step - self._first_step
        spent = self._step_end - self._start
        return spent / max(1, done) * (state.max_steps - state.global_step)


def show(trainer: Any, memory: PeakMemory) -> None:
    """Make a trainer show its progress, unless its progress bar is disabled."""
    ScreenCallback(memory, lines=not sys.stderr.isatty()).watch(trainer)


def trained_parameters(model: nn.Module) -> str:
    """Log the number of trainable parameters by part, and their share of all.

    PEFT's copies beside modules that train in full do not count.
    """
    parts: Counter[str] = Counter()
    total = 0
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        # bitsandbytes packs two 4-bit weights into a byte, whatever the storage type.
        packed = type(parameter).__name__ == "Params4bit"
        count = parameter.numel() * (2 * parameter.element_size() if packed else 1)
        count = getattr(parameter, "ds_numel", count)  # ZeRO-3 empties its parameters
        total += count
        if parameter.requires_grad:
            parts[_part(name, hasattr(model, "peft_config"))] += count
    trained = parts.total()
    text = f"{trained:,} of {total:,} parameters train ({trained / max(1, total):.2%})"
    said = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    return f"{text}: {said}" if len(parts) > 1 else text


def _part(name: str, adapted: bool) -> str:
    """Return the part that a parameter belongs to: the adapter, a fully trained module, biases."""
    before, full, _ = name.partition(".modules_to_save.")
    if full:
        return before.rpartition(".")[2]
    if adapted and name.endswith(".bias"):
        return "biases"
    return "adapter" if adapted else "model"


def _tokens(inputs: dict[str, Any]) -> Any:
    """Return the number of tokens in a batch without padding, as a number or a tensor."""
    if (mask := inputs.get("attention_mask")) is not None:
        return mask.sum()
    ids = inputs.get("input_ids")
    return 0 if ids is None else ids.numel()
