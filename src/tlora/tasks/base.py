"""A task: where to find its rows, how to turn a row into prompt and answer, how to score them.

The call order, in `tlora.training`::

    task = Task(data)                        # data: a DataConfig
    task.settle(has_template, positions)     # fill in defaults that depend on the model
    train, held_out = task.load(train_file, eval_file)   # raw rows, columns checked
    rows = task.rows(train, name)            # raw rows -> the shapes below, by task.row
    scores = task.metrics(predictions, labels)           # for a model with a head, or
    scores = task.reply_metrics(replies, targets)        # for one that generates

Shapes of a row, by kind (`tlora.tasks.tokens` turns them into token ids):

- "causal": {"prompt", "response"}, or {"messages"} and optionally {"tools", "first"}, or {"text"};
- "seq2seq": {"prompt", "response"};
- "classification": {"text", "text_pair" (maybe None), "label": int};
- "regression": the same with "label": float.
"""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError, Faults, shortened
from tlora.tasks import mixture, source
from tlora.tasks.dataconfig import ABOUT_TEXT, DataConfig, Format, Kind

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

Row = dict[str, Any]

INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
"""The paper's zero-shot prompt (arXiv 2604.18124, appendix), in training and test."""
LONGEST = 2048
"""Default maximum tokens per row, unless the user or the model sets a lower limit."""


class Task(ABC):
    """A task over rows from local files or a Hub dataset."""

    kind: Kind = "causal"
    """The kind of loss and head that the task trains."""
    other_kinds: tuple[Kind, ...] = ()
    """Other kinds that `data.kind` may select."""
    reads_replies: bool = False
    """Whether `reply_metrics` scores generated replies."""
    classifies: bool = False
    """Whether rows are texts to classify, even when trained as text to text."""
    label_names: list[str] | None = None
    """Class names by id, for a classification task."""
    exact: bool = False
    """Whether a reply is correct only if it equals the row's response exactly."""
    formats: tuple[Format, ...] = ("raw",)
    """Values of `data.format` that the task accepts besides "auto"; the first is the default."""
    reads: tuple[str, ...] = ABOUT_TEXT
    """Fields of `data` in `ABOUT_TEXT` that affect the task."""
    hub: tuple[str, str | None] | None = None
    """Default Hub dataset, (name, configuration), used when no file is given."""
    hub_eval_split: str | None = None
    """Split of `hub` to evaluate on."""

    def __init__(self, data: DataConfig) -> None:
        self.data = dataclasses.replace(data)
        known = (self.kind, *self.other_kinds)
        if data.kind not in (None, *known):
            raise ConfigError(
                f"`data.kind` is {data.kind!r}, but this task supports"
                f" {' or '.join(map(repr, known))};"
                f" {'choose one of them' if self.other_kinds else 'remove it'}.",
                where="data",
            )
        self.kind = data.kind or self.kind
        if data.format not in ("auto", *self.formats):
            raise ConfigError(
                f"`data.format` is {data.format!r}, but this task has its own prompts"
                f" ({' or '.join(map(repr, self.formats))}); remove it, or use --task jsonl.",
                where="data",
            )

    def settle(self, has_template: bool, positions: int | None) -> None:
        """Fill in the fields of `data` whose defaults depend on the model.

        Args:
            has_template: whether the model's tokenizer has a chat template.
            positions: the model's maximum context length in tokens; None if unknown.
        """
        data = self.data
        data.max_length = data.max_length or min(LONGEST, positions or LONGEST)
        if data.format == "auto":
            data.format = self.formats[0]

    @abstractmethod
    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Convert one raw row into a row of the task's kind.

        Args:
            raw: the columns as stored in the file.
            where: file and row number, for error messages.

        Raises:
            DataError: a column is missing, empty or has an invalid value.
        """

    def rows(self, raw: Dataset, name: str) -> list[Row]:
        """Convert all raw rows; errors refer to them as ``name`` and a row number from 1.

        Raises:
            DataError: as `row`.
        """
        return [self.row(row, where) for where, row in mixture.placed(raw, name)]

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score ``predictions`` (rows, or rows x classes) against ``labels`` (rows).

        A task without metrics, such as a causal one, is evaluated by its loss alone.
        """
        return {}

    def reply_metrics(self, replies: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """Score generated replies against the rows' reference responses.

        Args:
            replies: one text per row, without special tokens.
            targets: the reference responses, after a round trip through the tokenizer.

        Raises:
            DataError: the tokenizer does not preserve a target.
        """
        return {}

    def read_file(self, path: str) -> Dataset:
        """Read a local file into raw rows."""
        return source.read_file(path)

    def check_file(self, path: str) -> None:
        """Check that `read_file` can read a local file, without reading rows.

        Raises:
            DataError: the file is missing, of an unknown kind or empty.
        """
        source.reader_of(path)

    def check_columns(self, have: list[str]) -> None:
        """Check the columns of the rows, for a task with user-named columns.

        Raises:
            ConfigError: a column is missing.
        """
        return

    def check_files(self, files: str, columns: bool) -> None:
        """Check one or several files (see `tlora.tasks.mixture`) without reading rows.

        Args:
            files: the files.
            columns: whether to check the columns of files that list them cheaply.

        Raises:
            ConfigError: a file lacks a column.
            DataError: a file is missing, of an unknown kind or empty.
        """
        for part in mixture.parts(files):
            self.check_file(part.path)
            if columns and (have := source.columns_of(part.path)):
                try:
                    self.check_columns(have)
                except DataError as error:
                    raise DataError(f"{part.path}: {error}") from None

    def check_sources(self, train_file: str | None, eval_file: str | None) -> None:
        """Check the sources of rows without reading any row.

        Raises:
            ConfigError: no training rows are given, a file lacks a column, or a field of
                `data` has no effect on the task.
            DataError: a file is missing, of an unknown kind or empty.
        """
        faults = Faults("data")
        with faults:
            self.check_fields()
        with faults:
            if not (train_file or self._dataset()[0]):
                raise ConfigError(
                    "no training rows; give --train_file or --data.dataset.", where="data"
                )
        with faults:
            if self.data.eval_split and not self.evaluates(train_file, eval_file):
                raise ConfigError(
                    "`data.eval_split` requires `data.dataset`; use --eval_file to evaluate on a"
                    " file.",
                    where="data",
                )
        for files in filter(None, (train_file, eval_file)):
            with faults:
                self.check_files(files, columns=files == train_file)
        faults.raise_found()

    def check_fields(self) -> None:
        """Check that the task uses the fields of `data` that are set.

        Raises:
            ConfigError: a field has no effect.
        """
        ignored = [n for n in self.data.given() if n in ABOUT_TEXT and n not in self.reads]
        if ignored:
            raise ConfigError(
                [f"`data.{name}` has no effect on this task; remove it." for name in ignored],
                where="data",
            )

    def evaluates(self, train_file: str | None, eval_file: str | None) -> bool:
        """Return whether `load` returns evaluation rows."""
        name, _, eval_split = self._dataset()
        of_hub = eval_split and name and not train_file
        return bool(eval_file or self.data.val_size or of_hub)

    def read_files(self, files: str) -> Dataset:
        """Read one or several files (see `tlora.tasks.mixture`)."""
        return mixture.read(files, self.read_file, self.data.subset_seed)

    def load(self, train_file: str | None, eval_file: str | None) -> tuple[Dataset, Dataset | None]:
        """Read the raw training rows and any raw evaluation rows.

        Raises:
            ConfigError: no training rows are given, or a file lacks a column.
            DataError: a file or dataset is missing, unreadable or empty.
        """
        self.check_sources(train_file, eval_file)
        data = self.data
        name, subset, eval_split = self._dataset()
        if train_file:
            train = self.read_files(train_file)
        else:
            train = source.read_hub(name, subset, data.train_split)
        held_out = None
        if eval_file:
            held_out = self.read_files(eval_file)
        elif eval_split and name and not train_file:
            held_out = source.read_hub(name, subset, eval_split)
        seed = data.subset_seed
        return _some(train, data.max_train_rows, seed), _some(held_out, data.max_eval_rows, seed)

    def held_out(self, file: str | None) -> tuple[Dataset, str]:
        """Read the raw rows for an evaluation without training, and return their name.

        Args:
            file: files, as `mixture.parts` reads them; if None, the rows come from
                `data.dataset` or the task's default dataset.

        Returns:
            Raw rows, at most `data.max_eval_rows`, and their name for messages.

        Raises:
            ConfigError: no source of rows is given, or two are.
            DataError: a file or dataset is missing, unreadable or empty.
        """
        self.check_held_out(file)
        data = self.data
        name, subset, split = self._dataset()
        if file:
            rows, where = self.read_files(file), file
        else:
            rows, where = source.read_hub(name, subset, str(split)), f"{name}, {split}"
        return _some(rows, data.max_eval_rows, data.subset_seed), where

    def check_held_out(self, file: str | None) -> None:
        """Check the source of the rows that `held_out` reads, without reading any.

        Raises:
            ConfigError: no source of rows is given, or two are, or the file lacks a column.
            DataError: the file is missing, of an unknown kind or empty.
        """
        data = self.data
        given = [n for n in ("dataset", "dataset_config", "eval_split") if getattr(data, n)]
        if file and given:
            raise ConfigError(
                f"`data.{given[0]}` and --test_file both give the rows to score; keep one of them.",
                "data",
            )
        if data.dataset_config and not data.dataset:
            raise ConfigError("`data.dataset_config` requires `data.dataset`; set it too.", "data")
        name, _, split = self._dataset()
        if file:
            self.check_files(file, columns=True)
        elif name and not split:
            raise ConfigError(
                f"the split of {name!r} to score is missing; set --data.eval_split.",
                where="data",
            )
        elif not name:
            raise ConfigError(
                "the task has no default dataset; give --test_file, or --data.dataset and"
                " --data.eval_split.",
                where="test_file",
            )

    @property
    def head(self) -> dict[str, Any]:
        """Model configuration fields that define a classification or regression head."""
        regression = self.kind == "regression"
        return {
            "num_labels": len(self.label_names or ["value"]),
            "problem_type": "regression" if regression else "single_label_classification",
        }

    def _dataset(self) -> tuple[str, str | None, str | None]:
        """Return name, subset and evaluation split of `data.dataset` or the task's default dataset.

        The name is empty if there is neither.
        """
        data = self.data
        if data.dataset:
            return data.dataset, data.dataset_config, data.eval_split
        name, subset = self.hub or ("", None)
        return name, subset, data.eval_split or self.hub_eval_split


def _some(rows: Any, limit: int | None, seed: int | None) -> Any:
    """Return the first ``limit`` rows, or ``limit`` random ones given a ``seed``, in file order."""
    if rows is None or limit is None or limit >= len(rows):
        return rows
    if seed is None:
        return rows.select(range(limit))
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))


def text_of(raw: Mapping[str, Any], column: str, where: str) -> str:
    """Return the text in ``column``, converting numbers to text.

    Raises:
        DataError: the column is missing or has no value in this row.
    """
    if column not in raw:
        have = ", ".join(map(repr, raw))
        raise DataError(f"{where}: column {column!r} is missing; the columns are {have}.")
    value = raw[column]
    endless = isinstance(value, float) and not math.isfinite(value)
    if value is None or endless or isinstance(value, (list, dict, bytes)):
        raise DataError(
            f"{where}: column {column!r} is {shortened(value)}, not text; fix or drop the row."
        )
    return str(value)
