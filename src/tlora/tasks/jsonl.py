"""Your own rows: any JSON, JSONL, CSV, TSV or Parquet file, or a dataset on the Hub.

Columns are named under `data.*`. Where none is named, the first of these that the rows have is
taken: `messages`; `prompt` with `response` or `completion`; `instruction` with `output` or
`response`; `question` with `answer`; `text`. An `input` beside `instruction`, as Alpaca's rows
have it, follows the instruction after a blank line. Where only the prompt is named, the response is
the first of `response`, `completion`, `output`, `answer` that the rows have.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from tlora.errors import ConfigError, DataError, did_you_mean
from tlora.tasks import metrics
from tlora.tasks.base import Row, Task, text_of
from tlora.tasks.dataconfig import DataConfig, Kind

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)


class Jsonl(Task):
    """Rows with columns of your own naming."""

    exact = True

    def __init__(self, data: DataConfig) -> None:
        if data.kind is not None and data.kind not in get_args(Kind):
            kinds = ", ".join(map(repr, get_args(Kind)))
            raise ConfigError(f"`data.kind` is {data.kind!r}; choose one of {kinds}.", where="data")
        self.kind = data.kind or "causal"
        super().__init__(data)
        self.label_names = data.label_names
        self._input = False
        self._make = {
            "causal": self._causal,
            "seq2seq": self._pair,
            "classification": self._labeled,
            "regression": self._labeled,
        }[self.kind]

    def load(self, train_file: str | None, eval_file: str | None) -> tuple[Dataset, Dataset | None]:
        """Read the rows, settle which columns are meant, and learn the classes."""
        train, held_out = super().load(train_file, eval_file)
        self.settle_columns(train.column_names)
        if self.kind == "classification" and self.label_names is None:
            values = train.unique(str(self.data.label_column))
            # Integer classes sort as numbers: "10" comes after "9".
            values.sort(key=lambda value: (isinstance(value, str), value))
            self.label_names = [str(value) for value in values]
        return train, held_out

    def held_out(self, file: str | None) -> tuple[Dataset, str]:
        """Read the rows and settle which columns are meant; the classes are those of training."""
        rows, where = super().held_out(file)
        self.settle_columns(rows.column_names)
        return rows, where

    def check_columns(self, have: list[str]) -> None:
        """Check, without settling anything, that the rows have the columns that are meant.

        Raises:
            ConfigError: as `settle_columns`.
        """
        type(self)(self.data).settle_columns(have)

    def settle_columns(self, have: list[str]) -> None:
        """Settle which of the columns that the rows ``have`` are meant.

        Raises:
            ConfigError: a named column is missing, or none is named and none is known.
        """
        data = self.data
        named = {
            name: value
            for name, value in vars(data).items()
            if name.endswith("_column") and value is not None
        }
        faults = [
            f"`data.{name}` is {value!r}, which is no column of the rows"
            f" ({', '.join(have)}).{did_you_mean(value, have)}"
            for name, value in named.items()
            if value not in have
        ]
        faults += [
            f"`data.prompt_template` has {{{name}}}, which is no column of the rows"
            f" ({', '.join(have)}).{did_you_mean(name, have)}"
            for name in _placeholders(data.prompt_template)
            if name not in have
        ]
        if self.kind in ("classification", "regression"):
            faults += [
                f"`data.{name}` is missing; name the column ({', '.join(have)})."
                for name in ("text_column", "label_column")
                if getattr(data, name) is None
            ]
        elif not named.keys() - {"response_column"} and not data.prompt_template:
            faults += self._guess_columns(have)
        elif (data.prompt_column or data.prompt_template) and not data.response_column:
            usual = (response for _, response in _PAIRS if response in have)
            data.response_column = next(usual, None)
            if data.response_column is None:
                faults.append(f"`data.response_column` is missing; name it ({', '.join(have)}).")
        if faults:
            raise ConfigError(faults, where="data")

    def _guess_columns(self, have: list[str]) -> list[str]:
        data = self.data
        if "messages" in have and self.kind == "causal":
            data.messages_column = "messages"
            return []
        for prompt, response in _PAIRS:
            if prompt in have and (data.response_column or response) in have:
                data.prompt_column = prompt
                data.response_column = data.response_column or response
                self._input = prompt == "instruction" and "input" in have
                return []
        if "text" in have and self.kind == "causal":
            data.text_column = "text"
            return []
        return [
            f"the rows have the columns {', '.join(have)}; name the ones to learn from by"
            " `data.prompt_column` and `data.response_column`, `data.messages_column` or"
            " `data.text_column`."
        ]

    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return the row in the shape of this task's kind."""
        return self._make(raw, where)

    def _causal(self, raw: Mapping[str, Any], where: str) -> Row:
        if self.data.messages_column:
            return {"messages": _messages(raw[self.data.messages_column], where)}
        if self.data.text_column:
            return {"text": text_of(raw, self.data.text_column, where)}
        return self._pair(raw, where)

    def _pair(self, raw: Mapping[str, Any], where: str) -> Row:
        data = self.data
        if data.prompt_template:
            values = {
                name: text_of(raw, name, where) for name in _placeholders(data.prompt_template)
            }
            prompt = data.prompt_template.format(**values)
        else:
            prompt = text_of(raw, str(data.prompt_column), where)
        if self._input and raw.get("input"):  # evaluation rows may have no such column
            prompt = f"{prompt}\n\n{text_of(raw, 'input', where)}"
        return {"prompt": prompt, "response": text_of(raw, str(data.response_column), where)}

    def _labeled(self, raw: Mapping[str, Any], where: str) -> Row:
        data = self.data
        pair = data.text_pair_column
        return {
            "text": text_of(raw, str(data.text_column), where),
            "text_pair": text_of(raw, pair, where) if pair else None,
            "label": self._label(text_of(raw, str(data.label_column), where), where),
        }

    def _label(self, text: str, where: str) -> float:
        column = self.data.label_column
        if self.kind == "regression":
            try:
                return float(text)
            except ValueError:
                raise DataError(f"{where}: column {column!r} is {text!r}, not a number.") from None
        names = self.label_names or []
        if text not in names:
            classes = ", ".join(map(repr, names))
            raise DataError(f"{where}: column {column!r} is {text!r}, not one of {classes}.")
        return names.index(text)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy and macro F1 of classes; correlations and mean squared error of numbers."""
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


def _placeholders(template: str | None) -> list[str]:
    try:
        parts = [part[1:] for part in string.Formatter().parse(template or "")]
    except ValueError as error:
        raise ConfigError(
            f"`data.prompt_template`: {error}; write a literal brace twice.", where="data"
        ) from None
    names = [name for name, _, _ in parts]
    if "" in names:
        raise ConfigError(
            "`data.prompt_template` has {}, which names no column; name one in the braces, or write"
            " a literal brace twice.",
            where="data",
        )
    if any(form or conversion for _, form, conversion in parts):
        raise ConfigError(
            f"`data.prompt_template` is {template!r}; give nothing but names of columns in braces.",
            where="data",
        )
    return [name for name in names if name is not None]


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    turns = value if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) and turn.get("role") for turn in turns):
        raise DataError(f"{where}: the chat is {value!r}; give a list of {{role, content}}.")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{where}: the chat has no assistant turn to learn from; drop the row.")
    # `datasets` fills fields that only other rows have with None, which templates stumble over.
    return [{key: part for key, part in turn.items() if part is not None} for turn in turns]
