"""The trainer of text-to-text tasks: its evaluations generate as `tlora eval` does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from transformers import Seq2SeqTrainer

from tlora.models.greedy import greedy


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
