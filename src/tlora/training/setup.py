"""Settles and checks everything about a run before its folder is touched."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError
from tlora.models.pretrained import Pretrained, check_model_folder, positions_of, set_token_ids
from tlora.models.tokens import add_tokens
from tlora.registry import METHODS
from tlora.tasks.base import Row, Task
from tlora.tasks.contamination import PromptIndex, overlapping_rows, prompt_of, refuse_overlap
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.heldout import held_out
from tlora.tasks.rendering import set_template
from tlora.tasks.tokens import show, tokenized
from tlora.training import preflight
from tlora.training.availability import check_asked
from tlora.training.kinds import KINDS, KindSpec, with_task_type
from tlora.training.runconfig import RunConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tlora.methods.base import Method, Samples

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Setup:
    """A checked run: its parts loaded, its rows tokenized, nothing written yet."""

    config: RunConfig
    method: Method
    options: Any
    """The method's options, including the task type."""
    task: Task
    kind: KindSpec
    tokenizer: PreTrainedTokenizerBase
    collator: Callable[..., Any]
    train: Dataset
    """Token ids and labels of the training rows."""
    held_out: Dataset | None
    """Token ids and labels of the evaluation rows."""
    validation: Dataset | None
    """Token ids and labels of a file of validation rows."""
    left_out: Sequence[int]
    """Indices of the raw training rows that were skipped because they repeat prompts."""
    settled: tuple[str, ...] = ()
    """Fields of `config` that were not given and got a value for this model."""

    def record(self) -> dict[str, Any]:
        """Return the resolved configuration for the run's folder, with `data` as settled.

        Resuming does not change the prompt format or the order of the head's outputs, even if the
        training rows change.
        """
        settled = {name: getattr(self.task.data, name) for name in ("format", "max_length")}
        if self.task.kind == "classification" and type(self.task).label_names is None:
            settled["label_names"] = self.task.label_names
        resolved = self.config.resolved()
        data = dataclasses.replace(resolved.data, **settled)
        return dataclasses.replace(resolved, data=data).to_dict()

    def calibration_batches(self) -> Samples:
        """Return the calibration rows in batches: the first ones after a seeded shuffle.

        In a process group they are divided among the processes, if the method sums their
        statistics.
        """
        from torch.utils.data import DataLoader

        from tlora.calibration.group import SINGLE_PROCESS, process_group
        from tlora.methods.base import Samples

        count = min(self.config.calibration.samples, len(self.train))
        group = process_group() if self.method.traits.pools else SINGLE_PROCESS
        own = range(group.process, count, group.size)
        rows = self.train.shuffle(seed=self.config.seed).select(own)
        options = self.config.calibration
        loader = DataLoader(rows, batch_size=options.batch_size, collate_fn=self.collator)
        return Samples(loader, options.skip_bad_samples, options.cache)

    def load_model(self, device: Any, shards: Sequence[str] = ()) -> PreTrainedModel:
        """Load the base model with the head of the task; the run's seed initializes a new head.

        Other missing parameters of a classifier (DeBERTa's pooler, say) are initialized too. An
        adapter does not save them, adapted or frozen, so they are added to the options'
        `modules_to_save`.

        Args:
            device: where to calibrate and train.
            shards: layers that FSDP2 gathers one at a time; each process then loads its part.

        Raises:
            ConfigError: there is no such model, it has no head of that kind, or it cannot be
                quantized as requested.
        """
        import transformers

        from tlora.calibration.preserve import keep_gradients

        transformers.set_seed(self.config.seed)
        head = self.head_fields()
        base = pretrained(self.config)
        model, missing = base.model(self.kind.auto_model, device, head=head, shards=shards)
        # Classifying decoders use it to find the last real token.
        set_token_ids(model.config, ["pad_token_id"], self.tokenizer.pad_token_id)
        if head:
            self._train_in_full(missing)
        self._train_tokens(model)
        self._check_room(model)
        keep_gradients(model)
        return model

    def _train_tokens(self, model: Any) -> None:
        """Give the added tokens rows of the embedding and the head, and make these trainable."""
        import transformers

        from tlora.models.tokens import make_rows, rows_of, with_rows

        added = self.tokenizer.convert_tokens_to_ids(list(self.config.tokens.add))
        if not added:
            return
        transformers.set_seed(self.config.seed)
        make_rows(model, self.tokenizer)
        if self.method.traits.leaves == "adapter":
            self.options = with_rows(self.options, rows_of(model, added))

    def _check_room(self, model: Any) -> None:
        """Check that the model has positions and embedding rows for every token.

        Raises:
            DataError: it does not.
        """
        from pyarrow import compute

        from tlora.calibration.limits import fault_of_ids

        names = (self.config.train_file, self.config.eval_file, None)
        kinds = ("training rows", "evaluation rows", "validation rows")
        for rows, name, kind in zip(
            (self.train, self.held_out, self.validation), names, kinds, strict=True
        ):
            if not rows:
                continue
            column = rows.data["input_ids"]
            longest = compute.max(compute.list_value_length(column)).as_py()
            largest = compute.max(compute.list_flatten(column)).as_py()
            if fault := fault_of_ids(model, longest or 0, largest or 0):
                raise DataError(f"a row of {name or kind} has {fault}.")

    def head_fields(self) -> dict[str, Any]:
        """Return the fields of the model's configuration for a classifier's head, or {}."""
        if self.kind.task_type != "SEQ_CLS":
            return {}
        names = self.task.label_names or ["value"]
        return self.task.head | {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }

    def _train_in_full(self, drawn: Iterable[str]) -> None:
        """Make modules with parameters missing from the files train in full, besides the head."""
        from tlora.calibration.targets import heads_of

        if not hasattr(self.options, "modules_to_save"):
            return  # the whole model trains
        known = set(heads_of(self.options))
        modules = {name.rpartition(".")[0] for name in drawn}
        new = sorted(m for m in modules if m and not known.intersection(m.split(".")))
        if new:
            asked = self.options.modules_to_save or []
            logger.warning(
                "%s has no %s, which starts at random; it trains in full and is "
                "saved with the adapter.",
                self.config.model,
                ", ".join(new),
            )
            self.options = dataclasses.replace(self.options, modules_to_save=asked + new)


def settle(config: RunConfig, validation: str | None = None) -> Setup:
    """Do the work of `settle_checked`, after `preflight.check`."""
    preflight.check(config, validation)
    return settle_checked(config, validation)


def settle_checked(
    config: RunConfig, validation: str | None = None, left_out: Sequence[int] | None = None
) -> Setup:
    """Check ``config`` against the method, the trainer, the model and the rows, in that order.

    Args:
        config: the run.
        validation: a further file of evaluation rows.
        left_out: indices of the training rows to skip, if overlap with evaluation rows is already
            known; None: overlap is searched here.

    Raises:
        ConfigError: a field is missing, unknown or out of range.
        DataError: rows are missing or not in the task's format, or training rows repeat prompts of
            evaluation rows, or validation rows repeat those of reported rows.
    """
    task = preflight.task_of(config)
    kind = KINDS[task.kind]
    options = with_task_type(kind, config.options())
    check_asked(kind, config)
    tokenizer = load_tokenizer(config)
    _check_reads(config, task)
    task.settle(tokenizer.chat_template is not None, positions(config, tokenizer))
    train, held_out, choosing = _read(config, task, validation)
    if left_out is None:
        left_out = _overlap(task, train, held_out, choosing)
    if left_out:
        train = train.without(left_out)
    if task.kind == "classification":
        _refuse_one_class(train, task)

    def encoded(part: _Part) -> Dataset:
        return tokenized(part.raw, part.rows, task, kind.encode, tokenizer, part.name)

    rows = encoded(train)
    show(tokenizer, rows[0], train.name)
    return Setup(
        config=config,
        method=METHODS.load(config.method)(),
        options=options,
        task=task,
        kind=kind,
        tokenizer=tokenizer,
        collator=kind.collator(tokenizer),
        train=rows,
        held_out=held_out and encoded(held_out),
        validation=choosing and encoded(choosing),
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Part:
    """Raw rows, their tokenized form, and their name in messages."""

    name: str
    raw: Dataset
    rows: list[Row]

    def without(self, left_out: Sequence[int]) -> _Part:
        kept = sorted(set(range(len(self.rows))).difference(left_out))
        return _Part(self.name, self.raw.select(kept), [self.rows[index] for index in kept])


def _read(
    config: RunConfig, task: Task, validation: str | None
) -> tuple[_Part, _Part | None, _Part | None]:
    """Return the training rows, the evaluation rows and those of the file ``validation``."""
    raw, held_out = task.load(config.train_file, config.eval_file)
    name = config.train_file or config.data.dataset or "training rows"
    train = _Part(name, raw, task.rows(raw, name))
    parts: list[_Part | None] = [None, None]
    if task.data.val_size is not None:
        train, parts[0] = _split(train, task)
    elif held_out is not None:
        other = config.eval_file or "evaluation rows"
        parts[0] = _Part(other, held_out, task.rows(held_out, other))
    if validation is not None:
        _, raw = task.load(config.train_file, validation)
        parts[1] = raw and _Part(validation, raw, task.rows(raw, validation))
    return train, parts[0], parts[1]


def _split(part: _Part, task: Task) -> tuple[_Part, _Part]:
    """Return the training rows and the rows that `data.val_size` holds out of them."""
    held = set(held_out(part.rows, task.data, part.name))
    kept = [index for index in range(len(part.rows)) if index not in held]
    validation = part.without(kept)
    logger.info("%s: %d rows are held out to evaluate on.", part.name, len(held))
    known = {"the rows held out": PromptIndex(map(prompt_of, validation.rows))}
    train = part.without(sorted(held))
    # A question may also occur inside another row; that is not the user's mistake.
    if task.data.overlap == "refuse":
        task = copy.copy(task)
        task.data = dataclasses.replace(task.data, overlap="drop")
    left_out = overlapping_rows(train.rows, known, task, part.name)
    return train.without(left_out), dataclasses.replace(validation, name="rows held out")


def _refuse_one_class(train: _Part, task: Task) -> None:
    found = {row["label"] for row in train.rows}
    if len(found) == 1:
        name = (task.label_names or [])[found.pop()]
        raise DataError(
            f"{train.name}: all {len(train.rows)} training rows have the label "
            f"{name!r}; give rows of two classes or more."
        )


def _overlap(
    task: Task, train: _Part, held_out: _Part | None, choosing: _Part | None
) -> Sequence[int]:
    """Return the indices of the training rows to skip."""
    prompts = {
        part.name: PromptIndex(map(prompt_of, part.rows))
        for part in (held_out, choosing)
        if part is not None
    }
    found = overlapping_rows(train.rows, prompts | guarded(task.data), task, train.name)
    if held_out is not None and choosing is not None:
        reported = (held_out.name, prompts[held_out.name])
        refuse_overlap(choosing.rows, reported, task, choosing.name)
    return found


def guarded(data: DataConfig) -> dict[str, PromptIndex]:
    """Return the prompts of the evaluations in `data.guard`, by name.

    Raises:
        ConfigError: an evaluation is unknown, or runs programs.
        DataError: its rows are not available.
    """
    if not data.guard:
        return {}
    from tlora.evaluations import catalog

    asked = catalog.prompts(data.guard, data.guard_dir, where="data.guard")
    return {
        name: PromptIndex(prompt_of({"prompt": prompt}) for prompt in prompts)
        for name, prompts in asked.items()
    }


def pretrained(config: RunConfig) -> Pretrained:
    """Return the base model of a run, and the precision to load it in."""
    return Pretrained(
        name=str(config.model),
        dtype=config.dtype,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
    )


def _check_reads(config: RunConfig, task: Task) -> None:
    """Check that a causal task has a causal model, before it is loaded.

    Raises:
        ConfigError: the model is an encoder-decoder, such as T5.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ,
    )

    family = pretrained(config).config().model_type
    if task.kind == "causal" and family in SEQ2SEQ and family not in CAUSAL:
        advice = "" if config.task == "jsonl" else "--task jsonl "
        raise ConfigError(
            f"{config.model!r} ({family}) is an encoder-decoder; give {advice}--data.kind seq2seq.",
            where="model",
        )


def positions(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the maximum number of tokens of the model, by its configuration and its tokenizer."""
    held = positions_of(pretrained(config).config())
    return min(tokenizer.model_max_length, held or tokenizer.model_max_length)


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; without a padding token, the closing token pads.

    Raises:
        ConfigError: there is no such model or no tokenizer with it.
        DataError: there is no token to pad with.
    """
    check_model_folder(config.model)
    tokenizer = pretrained(config).tokenizer()
    add_tokens(tokenizer, config.tokens.add)
    if config.data.chat_template:
        set_template(tokenizer, config.data.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise DataError(f"the tokenizer of {config.model!r} has no token to pad with; add one.")
    return tokenizer
