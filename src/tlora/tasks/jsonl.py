"""Your own rows: JSON, JSONL, CSV, TSV, Parquet or text files, or a dataset on the Hub.

`data.*` names the columns. Without names, `tlora.tasks.shapes` infers the shape of each file's rows
from its columns, and `tlora.tasks.formats` writes them according to `data.format`. If only the
prompt is named, the response is the first of `response`, `completion`, `output`, `answer`.
"""

from __future__ import annotations

import logging
import math
import string
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, get_args

from tlora.errors import ConfigError, DataError, did_you_mean, shortened
from tlora.tasks import formats, labels, metrics, mixture, rendering
from tlora.tasks.base import Row, Task, text_of
from tlora.tasks.dataconfig import DataConfig, Format, Kind
from tlora.tasks.shapes import SHAPES, Shape, known_shape, preference

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

logger = logging.getLogger(__name__)


_RESPONSES = ("response", "completion", "output", "answer")
_PROMPTS = ("prompt_column", "response_column", "prompt_template", "system")
_LABELS = ("text_column", "text_pair_column", "label_column", "label_names")
_READS: dict[Kind, tuple[str, ...]] = {
    "causal": (*_PROMPTS, "messages_column", "text_column", "chat_template", "loss_on"),
    "seq2seq": _PROMPTS,
    "classification": _LABELS,
    "regression": _LABELS[:-1],
}
_ALSO_WRITTEN: dict[Kind, tuple[Format, ...]] = {
    "causal": ("alpaca", "chat"),
    "seq2seq": ("alpaca",),
    "classification": (),
    "regression": (),
}
"""Formats of each kind besides "raw"."""


class Jsonl(Task):
    """Rows with user-named columns."""

    exact = True
    formats: tuple[Format, ...] = ("raw", "alpaca", "chat")

    def __init__(self, data: DataConfig) -> None:
        if data.kind is not None and data.kind not in get_args(Kind):
            kinds = ", ".join(map(repr, get_args(Kind)))
            raise ConfigError(f"`data.kind` is {data.kind!r}; choose one of {kinds}.", where="data")
        self.kind = data.kind or "causal"
        super().__init__(data)
        self._labeled_kind = self.kind in ("classification", "regression")
        if data.format not in ("auto", "raw", *_ALSO_WRITTEN[self.kind]):
            raise ConfigError(
                f"`data.format` is {data.format!r}, which has no effect on a {self.kind} task;"
                " remove it.",
                "data",
            )
        self.reads = _READS[self.kind]
        self.label_names = data.label_names
        self._shapes: dict[tuple[str, ...], Shape] = {}
        self._has_template: bool | None = None

    def settle(self, has_template: bool, positions: int | None) -> None:
        """Like `Task.settle`, but resolve "auto" once the shapes of the rows are known."""
        asked = self.data.format
        super().settle(has_template, positions)
        self.data.format, self._has_template = asked, has_template

    def load(self, train_file: str | None, eval_file: str | None) -> tuple[Dataset, Dataset | None]:
        """Read the rows; determine columns, format and classes."""
        train, held_out = super().load(train_file, eval_file)
        self._meet(train, train_file or self.data.dataset or "training rows")
        if held_out is not None:
            self._meet(held_out, eval_file or "evaluation rows")
        if self.kind == "classification" and self.label_names is None:
            column = str(self.data.label_column)
            name = train_file or self.data.dataset or "training rows"
            self.label_names = labels.classes(mixture.placed(train, name), column)
        return train, held_out

    def held_out(self, file: str | None) -> tuple[Dataset, str]:
        """Read the rows and determine the columns; keep the classes from training."""
        rows, where = super().held_out(file)
        self._meet(rows, where)
        return rows, where

    def check_columns(self, have: list[str]) -> None:
        """Check that the rows have the needed columns, without changing `data`.

        Raises:
            ConfigError: as `settle_columns`.
        """
        type(self)(self.data).settle_columns(have)

    def settle_columns(self, have: list[str]) -> None:
        """Choose the columns to read among those that the rows ``have``.

        Raises:
            ConfigError: a named column is missing, or no column is named or recognized.
        """
        if not self._labeled_kind:
            self._settle_format([self._shape(have)])
        elif faults := [*self._missing(have), *self._unnamed(have)]:
            raise ConfigError(faults, where="data")

    def _meet(self, raw: Dataset, name: str) -> None:
        """Determine and log the shape of each file and the format of all."""
        found = mixture.heads(raw, name)
        if self._labeled_kind:
            for file, (first, count) in found.items():
                self.settle_columns([*first])
                read = {self.data.text_column, self.data.text_pair_column, self.data.label_column}
                logger.info("%s: reading %d rows as texts with labels.", file, count)
                _say_unread(file, first, read)
            return
        shapes = {}
        for file, (first, _) in found.items():
            try:
                shapes[file] = self._shape([*first])
            except DataError as error:
                raise DataError(f"{file}: {error}") from None
            except ConfigError as error:
                raise ConfigError(error.faults, "data" if len(found) == 1 else file) from None
        self._settle_format([*shapes.values()])
        for file, (first, count) in found.items():
            shape, style = shapes[file], self.data.format
            chat = shape.form == "chat" or any(
                isinstance(first.get(c), list) for c in shape.columns
            )
            style = "raw" if shape.form == "text" else "chat" if chat else style
            if style == "chat" and self._has_template is False:
                raise DataError(f"{file}: {rendering.NO_TEMPLATE}")
            logger.info(
                "%s: reading %d rows as %s, %s.", file, count, shape.name, formats.SAYS[style]
            )
            if self.data.system and shape.form == "text":
                logger.warning("%s: `data.system` has no effect on plain text.", file)
            if self.data.chat_template and style != "chat":
                logger.warning("%s: `data.chat_template` has no effect on these rows.", file)
            read = {*shape.columns, *shape.optional, *_placeholders(self.data.prompt_template)}
            _say_unread(file, first, read)

    def _settle_format(self, shapes: list[Shape]) -> None:
        data = self.data
        if data.format != "auto":
            return
        stay = {"pair", "text"} | ({"instruction"} if data.prompt_template else set())
        if self.kind != "causal" or all(shape.form in stay for shape in shapes):
            data.format = "raw"
        else:
            chat = self._has_template or any(shape.form == "chat" for shape in shapes)
            data.format = "chat" if chat else "alpaca"

    def _shape(self, have: list[str]) -> Shape:
        """Return the shape of rows with the columns ``have``.

        Raises:
            ConfigError: as `settle_columns`.
            DataError: they are preference pairs.
        """
        key = tuple(have)
        if key not in self._shapes:
            self._shapes[key] = self._named_shape(have)
        return self._shapes[key]

    def _named_shape(self, have: list[str]) -> Shape:
        data = self.data
        response = data.response_column
        asks = data.prompt_column or data.prompt_template
        faults = self._missing(have)
        if asks and not response:
            response = next((name for name in _RESPONSES if name in have), None)
        if asks and not response:
            faults.append(f"`data.response_column` is missing; choose one of {', '.join(have)}.")
        if faults:
            raise ConfigError(faults, where="data")
        if data.messages_column:
            return Shape("chats", "chat", (data.messages_column,), ("system", "tools"))
        if data.text_column:
            return Shape("plain text", "text", (data.text_column,))
        if asks:
            name = f"{data.prompt_column or 'prompts of a template'} and {response}"
            return Shape(name, "instruction", (data.prompt_column or "", str(response)))
        if not response and preference(have):
            raise DataError(
                "the rows have the columns 'chosen' and 'rejected', but preference training is not"
                " supported; to train on the chosen answers, convert them to rows with a prompt and"
                " a response, or with `messages`."
            )
        if shape := known_shape(have, self.kind, response):
            return shape
        raise ConfigError(f"{_unrecognized(have)}{self._other_kind(have)}", where="data")

    def _other_kind(self, have: list[str]) -> str:
        """Return a hint if the rows fit another kind."""
        if self.kind == "causal" and {"label"} & {*have}:
            return " For rows with labels, use --data.kind classification."
        if self.kind == "seq2seq" and (shape := known_shape(have, "causal")):
            return " Text to text needs a prompt and a response; only causal models train on"
            f" {shape.name}."
        return ""

    def _missing(self, have: list[str]) -> list[str]:
        """Return an error for each named column that is missing."""
        data = self.data
        named = {
            f"`data.{name}` is {value!r}": value
            for name, value in vars(data).items()
            if name.endswith("_column") and value is not None
        }
        named |= {
            f"`data.prompt_template` has {{{name}}}": name
            for name in _placeholders(data.prompt_template)
        }
        return [
            f"{said}, but the rows have no such column ({', '.join(have)})."
            f"{did_you_mean(name, have)}"
            for said, name in named.items()
            if name not in have
        ]

    def _unnamed(self, have: list[str]) -> list[str]:
        return [
            f"`data.{name}` is missing; choose one of {', '.join(have)}."
            for name in ("text_column", "label_column")
            if getattr(self.data, name) is None
        ]

    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return the row in the shape of this task's kind."""
        if self._labeled_kind:
            return self._labeled(raw, where)
        data, shape = self.data, self._shape([*raw])
        if template := data.prompt_template:
            values = {name: text_of(raw, name, where) for name in _placeholders(template)}
            raw = {**raw, shape.columns[0]: template.format(**values)}
        style: Format = "raw" if data.format == "auto" else data.format
        return formats.write(shape.convert(raw, where), style, data.system)

    def _labeled(self, raw: Mapping[str, Any], where: str) -> Row:
        data = self.data
        pair = data.text_pair_column
        return {
            "text": text_of(raw, str(data.text_column), where),
            "text_pair": text_of(raw, pair, where) if pair else None,
            "label": self._label(raw, where),
        }

    def _label(self, raw: Mapping[str, Any], where: str) -> float:
        column = str(self.data.label_column)
        if self.kind == "regression":
            text = text_of(raw, column, where)
            try:
                if math.isfinite(number := float(text)):
                    return number
                raise ValueError(text)
            except ValueError:
                raise DataError(
                    f"{where}: column {column!r} is {shortened(text)!r}, not a number."
                ) from None
        name = labels.name_of(raw, column, where)
        known = [labels.canonical(each) for each in self.label_names or []]
        if name not in known:
            classes = ", ".join(map(repr, self.label_names or []))
            raise DataError(
                f"{where}: column {column!r} is {shortened(name)!r}, not one of {classes}."
            )
        return known.index(name)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return accuracy and macro F1 for classes; correlations and MSE for numbers."""
        if self.kind == "regression":
            numbers = predictions.reshape(len(labels))
            error = float(((numbers - labels) ** 2).mean())
            return metrics.correlations(numbers, labels) | {"mse": error}
        if self.kind == "classification":
            classes = predictions.argmax(axis=-1)
            return {
                "accuracy": metrics.accuracy(classes, labels),
                "f1_macro": metrics.f1(classes, labels, average="macro"),
            }
        return {}


def _unrecognized(have: list[str]) -> str:
    """Return a message that asks which columns to read, with a hint for a misspelled one."""
    named = all(map(str.isidentifier, have)) and len(have) == 2
    prompt, response = (f" {name}" for name in have) if named else (" NAME", " NAME")
    known = [name for shape in SHAPES for name in shape.columns]
    hints = [did_you_mean(name, known) for name in have if name not in known]
    return (
        f"the column{'s' * (len(have) > 1)} {', '.join(have)}"
        f" {'are' if len(have) > 1 else 'is'}"
        " not recognized; say which columns hold the prompt and the response"
        f" (--data.prompt_column{prompt} --data.response_column{response}), a chat"
        f" (--data.messages_column) or plain text (--data.text_column)."
        f"{next(filter(None, hints), '')}"
    )


def _say_unread(file: str, first: Mapping[str, Any], read: Collection[str | None]) -> None:
    if unread := [column for column in first if column not in read]:
        logger.warning("%s: ignoring unused columns %s.", file, ", ".join(map(repr, unread)))


def _placeholders(template: str | None) -> list[str]:
    try:
        parts = [part[1:] for part in string.Formatter().parse(template or "")]
    except ValueError as error:
        raise ConfigError(
            f"`data.prompt_template`: {error}; double every literal brace.", where="data"
        ) from None
    names = [name for name, _, _ in parts]
    if "" in names:
        raise ConfigError(
            "`data.prompt_template` has empty braces {}; put a column name in them, or double every"
            " literal brace.",
            where="data",
        )
    if any(form or conversion for _, form, conversion in parts):
        raise ConfigError(
            f"`data.prompt_template` is {template!r}; only use plain column names in braces.",
            where="data",
        )
    return [name for name in names if name is not None]
