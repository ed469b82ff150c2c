"""Trainer callbacks of the stages."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from tlora.training.runfolder import RunFolder


class LogCallback(TrainerCallback):
    """Appends every line that the trainer logs to the run's log.jsonl, with its step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line; the numbers stay as the trainer made them."""
        if state.is_world_process_zero and logs:
            self.folder.append_log({"step": state.global_step, **logs})


class BarCallback(ProgressCallback):
    """The trainer's progress bar, with the loss on the bar itself; the log has every line."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the latest loss and learning rate."""
        if self.training_bar is not None and logs:
            shown = {"loss": logs.get("loss"), "lr": logs.get("learning_rate")}
            self.training_bar.set_postfix(
                {name: f"{float(value):.3g}" for name, value in shown.items() if value is not None}
            )


def replace_bar(trainer: Any) -> None:
    """Give a trainer our bar in place of its own; without a bar nothing changes."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BarCallback)
