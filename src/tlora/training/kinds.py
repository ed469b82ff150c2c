"""What each kind of task means for the model, the tokens and the trainer: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tlora.checks import fault
from tlora.config import TaskType
from tlora.errors import ConfigError, did_you_mean
from tlora.tasks import tokens
from tlora.tasks.dataconfig import Kind
from tlora.training.argumentfields import declared_fields


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
    """Fields of the training arguments that `tlora train` sets itself."""


# Rows are tokenized before the trainer sees them, so its own wishes about rows have no effect.
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

_LABELED: dict[str, Any] = {
    "task_type": "SEQ_CLS",
    "auto_model": "transformers:AutoModelForSequenceClassification",
    "trainer": "transformers:Trainer",
    "arguments": "transformers:TrainingArguments",
    "encode": tokens.labeled,
    "collator": tokens.labeled_collator,
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
        trainer="tlora.training.trainers:GreedyTrainer",
        arguments="transformers:Seq2SeqTrainingArguments",
        encode=tokens.seq2seq,
        collator=tokens.seq2seq_collator,
    ),
    "classification": KindSpec(**_LABELED),
    "regression": KindSpec(**_LABELED),
}

_ELSEWHERE = {
    "output_dir": "give --output_dir",
    "seed": "give --seed",
    "max_length": "give --data.max_length",
    "model_init_kwargs": "give --dtype",
    "trust_remote_code": "give --trust_remote_code",
    "completion_only_loss": "give --data.loss_on",
    "assistant_only_loss": "give --data.loss_on",
    "resume_from_checkpoint": "rerun the same command to resume",
}


def check_trainer_fields(kind: KindSpec, fields: dict[str, Any]) -> None:
    """Check what is under `trainer.*` against the training arguments of this kind.

    Raises:
        ConfigError: a name is unknown (with a suggestion) or set elsewhere (with the place), or a
            value is not of the field's type; all faults at once.
    """
    declared = declared_fields(kind.arguments)
    owned = {"output_dir", "seed", "resume_from_checkpoint", *kind.owned}
    faults = []
    for name, value in fields.items():
        if name not in declared:
            faults.append(f"there is no field `{name}`.{did_you_mean(name, declared)}")
        elif name in owned:
            advice = _ELSEWHERE.get(name, "leave it out: rows are tokenized before the trainer")
            faults.append(f"`{name}` has no effect here; {advice}.")
        else:
            # transformers does not look: a word for a rate would fail only when training starts.
            faults += fault(name, declared[name], value)
    if faults:
        raise ConfigError(faults, where="trainer")
