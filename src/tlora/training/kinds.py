"""The model, tokens and trainer of each kind of task: one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tlora.checks import fault, fitted
from tlora.config import TaskType
from tlora.errors import ConfigError, did_you_mean
from tlora.tasks import tokens
from tlora.tasks.dataconfig import Kind
from tlora.training import fieldrules
from tlora.training.argumentfields import declared_fields


@dataclass(frozen=True)
class KindSpec:
    """The classes for one kind of task, named as "module:name" for `load_class`."""

    task_type: TaskType
    """PEFT's name of the kind."""
    auto_model: str
    """Class that loads the model with the right head."""
    trainer: str
    arguments: str
    encode: tokens.Encode
    collator: Callable[[Any], Callable[..., Any]]
    adapts_head: bool = True
    """Whether the trainer's loss runs the output layer as a module, so that an adapter on it
    trains."""
    owned: tuple[str, ...] = ()
    """Fields of the training arguments that `tlora train` sets itself."""


# Rows are tokenized before the trainer sees them, so its own fields about rows have no effect.
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
        adapts_head=False,  # TRL multiplies by the weight of the output layer itself
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


def with_task_type(kind: KindSpec, options: Any) -> Any:
    """Return a method's options with the task type of this kind.

    Raises:
        ConfigError: they name the task type of another task.
    """
    if options.task_type not in (None, kind.task_type):
        raise ConfigError(
            f"`task_type` is {options.task_type!r}, but this task is "
            f"{kind.task_type!r}; remove it.",
            where="adapter",
        )
    return dataclasses.replace(options, task_type=kind.task_type)


def check_trainer_fields(kind: KindSpec, fields: dict[str, Any]) -> None:
    """Check the fields under `trainer.*` against the training arguments of this kind.

    Raises:
        ConfigError: a name is unknown (with a suggestion) or set elsewhere (with the place), or a
            value is not of the field's type or out of range; all faults are reported.
    """
    declared = declared_fields(kind.arguments)
    owned = {"output_dir", "seed", "resume_from_checkpoint", *kind.owned}
    faults = []
    for name, value in fields.items():
        if name not in declared:
            faults.append(f"there is no field `{name}`.{did_you_mean(name, declared)}")
        elif name in owned:
            advice = _ELSEWHERE.get(name, "remove it: rows are tokenized before the trainer")
            faults.append(f"`{name}` has no effect here; {advice}.")
        else:
            # transformers does not check: a word for a rate would fail only when training starts.
            field_type = fieldrules.RULES.get(name, declared[name])
            faults += fault(name, field_type, fitted(declared[name], value))
    faults += fieldrules.relations(fields)
    if faults:
        raise ConfigError(faults, where="trainer")
