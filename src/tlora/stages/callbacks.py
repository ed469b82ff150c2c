"""Trainer callbacks of the stages."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from tlora.runfolder import RunFolder


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
