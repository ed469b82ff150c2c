"""Extensions of the trainers of transformers and TRL for `tlora train`."""

from __future__ import annotations

import functools
import importlib
from contextlib import nullcontext
from typing import Any

from transformers import EarlyStoppingCallback, Seq2SeqTrainer, TrainerCallback

from tlora.models.greedy import greedy
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder


class GreedyTrainer(Seq2SeqTrainer):
    """transformers' trainer with greedy replies in evaluations.

    A checkpoint's penalties or beams are ignored; `generation_num_beams` and `generation_config` of
    the training arguments apply.
    """

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return (loss, generated tokens, labels) of a batch, as `Seq2SeqTrainer` does."""
        asked = not self.args.predict_with_generate or self.args.generation_config is not None
        with nullcontext() if asked else greedy(self.model, self.processing_class):
            return super().prediction_step(model, inputs, *args, **kwargs)


class LogCallback(TrainerCallback):
    """Appends every line that the trainer logs to the run's log.jsonl, with its step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line; the numbers are the trainer's, unchanged."""
        if state.is_world_process_zero and logs:
            self.folder.append_log({"step": state.global_step, **logs})


def stopping(config: RunConfig) -> list[TrainerCallback]:
    """Return transformers' early-stopping callback, if the run requests it."""
    patience = config.early_stopping
    return [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []


def keep_dtypes(trainer: Any) -> None:
    """Make a trainer that resumes load its checkpoint with the adapter's current dtypes.

    On a quantized base TRL trains B in bfloat16, but PEFT converts loaded weights to float32, so
    the run would continue in another precision. No callback runs between loading and the optimizer,
    so the trainer's own method is wrapped.
    """
    load = trainer._load_from_checkpoint

    def loaded(*args: Any, **kwargs: Any) -> None:
        before = {name: value.dtype for name, value in trainer.model.named_parameters()}
        load(*args, **kwargs)
        for name, value in trainer.model.named_parameters():
            if value.dtype != before[name]:
                value.data = value.data.to(before[name])

    trainer._load_from_checkpoint = loaded


def score_labels_alone() -> None:
    """On a CPU, make TRL apply the LM head only at positions whose next token counts.

    TRL does so on GPUs. Elsewhere it scores every position and drops the prompt's afterwards, to
    keep shapes constant for compilers; on a CPU that is a third of a step's time. The losses are
    equal. The name is private to `trl.trainer.utils` and affects nothing else; without it training
    is only slower.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    gathers = getattr(utils, "_use_triton", None)
    if gathers is None or hasattr(gathers, "__wrapped__"):
        return

    @functools.wraps(gathers)
    def on_cpus_too(device: Any) -> bool:
        return device.type == "cpu" or gathers(device)

    utils._use_triton = on_cpus_too
