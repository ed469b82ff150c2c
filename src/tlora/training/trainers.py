"""What `tlora train` adds to the trainers of transformers and TRL."""

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
    """transformers' trainer, whose evaluations reply greedily.

    A checkpoint's penalties or beams do not count; `generation_num_beams` and `generation_config`
    of the training arguments do.
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
        """Write one line; the numbers stay as the trainer made them."""
        if state.is_world_process_zero and logs:
            self.folder.append_log({"step": state.global_step, **logs})


def stopping(config: RunConfig) -> list[TrainerCallback]:
    """Return transformers' callback that stops a run early, if the run asks for it."""
    patience = config.early_stopping
    return [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []


def keep_dtypes(trainer: Any) -> None:
    """Let a trainer that resumes load its checkpoint into the adapter's dtypes, as they are.

    On a quantized base TRL trains B in bfloat16, but PEFT widens what it loads to float32, and
    the run would go on in another precision than it began. No callback comes between that and the
    optimizer, hence the trainer's own method.
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
    """Let TRL on a CPU multiply by the LM head only the positions whose next token counts.

    TRL does so on GPUs. Elsewhere it scores every position and drops the prompt's afterwards, to
    keep shapes the same for compilers; on a CPU that is a third of a step's time. The losses are
    the same. The name is private to `trl.trainer.utils`, where it decides nothing else; without it
    training is only slower.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    gathers = getattr(utils, "_use_triton", None)
    if gathers is None or hasattr(gathers, "__wrapped__"):
        return

    @functools.wraps(gathers)
    def on_cpus_too(device: Any) -> bool:
        return device.type == "cpu" or gathers(device)

    utils._use_triton = on_cpus_too
