"""What a task is: where its rows are, how a raw row becomes prompt and answer, how it is scored.

The call order, in `tlora.training`::

    task = Task(data)                        # data: a DataConfig
    task.settle(has_template, positions)     # what `data` leaves to the model
    train, held_out = task.load(train_file, eval_file)   # raw rows, columns checked
    rows = task.rows(train, name)            # raw rows -> the shapes below, by task.row
    scores = task.metrics(predictions, labels)           # of a model with a head, or
    scores = task.reply_metrics(replies, targets)        # of one that generates

Shapes of a row, by kind (`tlora.tasks.tokens` turns them into token ids):

- "causal": {"prompt", "response"}, or {"messages"} and maybe {"tools", "first"}, or {"text"};
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
"""Tokens kept of a row where neither the user nor the model says less."""


class Task(ABC):
    """A task over rows of local files or of a Hub dataset."""

    kind: Kind = "causal"
    """Which loss and which head the task trains."""
    other_kinds: tuple[Kind, ...] = ()
    """Kinds that `data.kind` may ask for in its place."""
    reads_replies: bool = False
    """Whether `reply_metrics` scores what the model generates."""
    classifies: bool = False
    """Whether a row is a text to be classified, even if it is put as text to text."""
    label_names: list[str] | None = None
    """Names of the classes by id, for a classification."""
    exact: bool = False
    """Whether a reply is right just if it is the row's response, word for word."""
    formats: tuple[Format, ...] = ("raw",)
    """Values of `data.format` that the task takes, besides "auto"; the first is what it writes."""
    reads: tuple[str, ...] = ABOUT_TEXT
    """Fields of `data` among `ABOUT_TEXT` that have an effect on the task."""
    hub: tuple[str, str | None] | None = None
    """Dataset on the Hub, (name, configuration), used when no file is given."""
    hub_eval_split: str | None = None
    """Split of `hub` to evaluate on."""

    def __init__(self, data: DataConfig) -> None:
        self.data = dataclasses.replace(data)
        known = (self.kind, *self.other_kinds)
        if data.kind not in (None, *known):
            raise ConfigError(
                f"`data.kind` is {data.kind!r}, but this task is {' or '.join(map(repr, known))};"
                f" {'choose one of them' if self.other_kinds else 'leave it out'}.",
                where="data",
            )
        self.kind = data.kind or self.kind
        if data.format not in ("auto", *self.formats):
            raise ConfigError(
                f"`data.format` is {data.format!r}, but this task has prompts of its own"
                f" ({' or '.join(map(repr, self.formats))}); leave it out, or use --task jsonl.",
                where="data",
            )

    def settle(self, has_template: bool, positions: int | None) -> None:
        """Settle the fields of `data` that are left to the model.

        Args:
            has_template: whether the model's tokenizer has a chat template.
            positions: tokens that the model holds; None: nobody says.
        """
        data = self.data
        data.max_length = data.max_length or min(LONGEST, positions or LONGEST)
        if data.format == "auto":
            data.format = self.formats[0]

    @abstractmethod
    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return the row of this kind that ``raw`` holds.

        Args:
            raw: the columns as they are in the file.
            where: file and row number, for the message of an error.

        Raises:
            DataError: a column is missing, empty or not what it should be.
        """

    def rows(self, raw: Dataset, name: str) -> list[Row]:
        """Return the rows that ``raw`` holds; errors call the rows ``name`` and a number from 1.

        Raises:
            DataError: as `row`.
        """
        return [self.row(row, where) for where, row in mixture.placed(raw, name)]

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score the model's ``predictions`` (rows, or rows x classes) against ``labels`` (rows).

        A task without scores of its own, such as a causal one, is judged by its loss alone.
        """
        return {}

    def reply_metrics(self, replies: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """Score the texts that a model generated against the rows' own responses.

        Args:
            replies: a text for each row, without special tokens.
            targets: the responses of the same rows, as the tokenizer gives them back.

        Raises:
            DataError: a target cannot be read back.
        """
        return {}

    def read_file(self, path: str) -> Dataset:
        """Read a local file into raw rows."""
        return source.read_file(path)

    def check_file(self, path: str) -> None:
        """Check that `read_file` may read a local file; no row is read.

        Raises:
            DataError: it is missing, of an unknown kind or empty.
        """
        source.reader_of(path)

    def check_columns(self, have: list[str]) -> None:
        """Check the columns of the rows, for a task whose columns the user names.

        Raises:
            ConfigError: one is missing.
        """
        return

    def check_files(self, files: str, columns: bool) -> None:
        """Check one file, or several as `tlora.tasks.mixture` names them; no row is read.

        Args:
            files: the files.
            columns: whether to check the columns of those that show them at a look.

        Raises:
            ConfigError: a file lacks a column.
            DataError: one is missing, of an unknown kind or empty.
        """
        for part in mixture.parts(files):
            self.check_file(part.path)
            if columns and (have := source.columns_of(part.path)):
                try:
                    self.check_columns(have)
                except DataError as error:
                    raise DataError(f"{part.path}: {error}") from None

    def check_sources(self, train_file: str | None, eval_file: str | None) -> None:
        """Check where rows come from, and the files that they come from; no row is read.

        Raises:
            ConfigError: no source of training rows is given, a file lacks a column, or a field of
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
                    "`data.eval_split` needs `data.dataset`; give --eval_file for rows of a file.",
                    where="data",
                )
        for files in filter(None, (train_file, eval_file)):
            with faults:
                self.check_files(files, columns=files == train_file)
        faults.raise_found()

    def check_fields(self) -> None:
        """Check that the task reads the fields of `data` that are given.

        Raises:
            ConfigError: a field has no effect.
        """
        ignored = [n for n in self.data.given() if n in ABOUT_TEXT and n not in self.reads]
        if ignored:
            raise ConfigError(
                [f"`data.{name}` has no effect on this task; leave it out." for name in ignored],
                where="data",
            )

    def evaluates(self, train_file: str | None, eval_file: str | None) -> bool:
        """Return whether `load` gives evaluation rows."""
        name, _, eval_split = self._dataset()
        of_hub = eval_split and name and not train_file
        return bool(eval_file or self.data.val_size or of_hub)

    def read_files(self, files: str) -> Dataset:
        """Read one file, or several as `tlora.tasks.mixture` names them."""
        return mixture.read(files, self.read_file, self.data.subset_seed)

    def load(self, train_file: str | None, eval_file: str | None) -> tuple[Dataset, Dataset | None]:
        """Read the raw training rows and, where there are any, the raw evaluation rows.

        Raises:
            ConfigError: no source of training rows is given, or a file lacks a column.
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
        """Read the raw rows that an evaluation without training scores, and say what they are.

        Args:
            file: their files, as `mixture.parts` reads them; without any they are those of
                `data.dataset`, or of the task's own.

        Returns:
            Raw rows, as many as `data.max_eval_rows` leaves, and a name of them for messages.

        Raises:
            ConfigError: no rows are named, or two places of them.
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
        """Check where the rows that `held_out` reads come from; no row is read.

        Raises:
            ConfigError: no rows are named, or two places of them, or the file lacks a column.
            DataError: the file is missing, of an unknown kind or empty.
        """
        data = self.data
        given = [n for n in ("dataset", "dataset_config", "eval_split") if getattr(data, n)]
        if file and given:
            raise ConfigError(
                f"`data.{given[0]}` and --test_file both say where the rows are; give one.", "data"
            )
        if data.dataset_config and not data.dataset:
            raise ConfigError("`data.dataset_config` needs `data.dataset`; give it too.", "data")
        name, _, split = self._dataset()
        if file:
            self.check_files(file, columns=True)
        elif name and not split:
            raise ConfigError(
                f"which rows of {name!r} are to be scored is not said; give --data.eval_split.",
                where="data",
            )
        elif not name:
            raise ConfigError(
                "the task has no rows of its own; give --test_file, or --data.dataset and"
                " --data.eval_split.",
                where="test_file",
            )

    @property
    def head(self) -> dict[str, Any]:
        """Fields of a model's configuration that give a classification or regression its head."""
        regression = self.kind == "regression"
        return {
            "num_labels": len(self.label_names or ["value"]),
            "problem_type": "regression" if regression else "single_label_classification",
        }

    def _dataset(self) -> tuple[str, str | None, str | None]:
        """Return name, subset and evaluation split of `data.dataset`, else of the task's own.

        The name is empty where there is none.
        """
        data = self.data
        if data.dataset:
            return data.dataset, data.dataset_config, data.eval_split
        name, subset = self.hub or ("", None)
        return name, subset, data.eval_split or self.hub_eval_split


def _some(rows: Any, limit: int | None, seed: int | None) -> Any:
    """Return the first ``limit`` rows, or as many drawn with ``seed``, in the order of the file."""
    if rows is None or limit is None or limit >= len(rows):
        return rows
    if seed is None:
        return rows.select(range(limit))
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))


def text_of(raw: Mapping[str, Any], column: str, where: str) -> str:
    """Return the text in ``column``; numbers are written out.

    Raises:
        DataError: the column is missing or has no value in this row.
    """
    if column not in raw:
        have = ", ".join(map(repr, raw))
        raise DataError(f"{where}: there is no column {column!r}; the columns are {have}.")
    value = raw[column]
    endless = isinstance(value, float) and not math.isfinite(value)
    if value is None or endless or isinstance(value, (list, dict, bytes)):
        raise DataError(
            f"{where}: column {column!r} is {shortened(value)}, not text; fix or drop the row."
        )
    return str(value)
