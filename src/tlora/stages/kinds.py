"""What each kind of task means for the model, the tokens and the trainer: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tlora.config import TaskType
from tlora.runconfig import Kind
from tlora.tasks import tokens


@dataclass(frozen=True)
class KindSpec:
    """What serves one kind. Classes are named as "module:name", for `load_class`."""

    task_type: TaskType
    """PEFT's name of the kind."""
    auto_model: str
    """Class that loads the model with the right head."""
    trainer: str
    arguments: str
    encode: tokens.Encode
    collator: Callable[[Any], Callable[..., Any]]
    owned: tuple[str, ...] = ()
    """Fields of the training arguments that the stages set themselves."""


# Rows are tokenised before the trainer sees them, so its own wishes about rows have no effect.
_ROWS_OWNED = (
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_text_field",
    "dataset_kwargs",
    "eos_token",
    "max_length",
    "model_init_kwargs",
    "pad_token",
    "trust_remote_code",
    "truncation_mode",
)

_LABELLED: dict[str, Any] = {
    "task_type": "SEQ_CLS",
    "auto_model": "transformers:AutoModelForSequenceClassification",
    "trainer": "transformers:Trainer",
    "arguments": "transformers:TrainingArguments",
    "encode": tokens.labelled,
    "collator": tokens.labelled_collator,
}

KINDS: dict[Kind, KindSpec] = {
    "causal": KindSpec(
        task_type="CAUSAL_LM",
        auto_model="transformers:AutoModelForCausalLM",
        trainer="trl:SFTTrainer",
        arguments="trl:SFTConfig",
        encode=tokens.causal,
        collator=tokens.causal_collator,
        owned=_ROWS_OWNED,
    ),
    "seq2seq": KindSpec(
        task_type="SEQ_2_SEQ_LM",
        auto_model="transformers:AutoModelForSeq2SeqLM",
        trainer="tlora.stages.text2text:GreedyTrainer",
        arguments="transformers:Seq2SeqTrainingArguments",
        encode=tokens.seq2seq,
        collator=tokens.seq2seq_collator,
    ),
    "classification": KindSpec(**_LABELLED),
    "regression": KindSpec(**_LABELLED),
}
