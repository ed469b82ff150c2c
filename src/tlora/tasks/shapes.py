"""Common shapes of rows, recognized by their columns: one table, one converter each.

A converter returns one of three forms:

- {"messages": [...]}, optionally with "tools", and with "first", the index of the first turn to
  train on, if earlier ones belong to the prompt;
- {"instruction", "response"}, optionally with "system" and "history" (pairs of a question and its
  answer);
- {"text"}.

`tlora.tasks.formats` writes these as a chat or as a prompt with its response. docs/data.md lists
them with examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tlora.errors import DataError, shortened
from tlora.tasks.base import Row, text_of
from tlora.tasks.conversation import check_answers, messages_of, parsed, tools_of

Form = Literal["chat", "instruction", "pair", "text"]


@dataclass(frozen=True)
class Shape:
    """One shape of rows: its identifying columns and its converter."""

    name: str
    """Name in log lines: "reading rows as ..."."""
    form: Form
    """Type of the rows. A "pair" is an instruction that stays unformatted unless `data.format` is
    set."""
    columns: tuple[str, ...]
    """Required columns, in the order in which ``convert`` reads them."""
    optional: tuple[str, ...] = ()
    """Optional columns."""

    def convert(self, raw: Mapping[str, Any], where: str) -> Row:
        """Convert a row.

        Raises:
            DataError: a column is empty or has an invalid value.
        """
        return _CONVERT[self.form](self, raw, where)


_TOOLS = ("tools",)
_ALPACA = ("input", "system", "history")

SHAPES = (
    Shape("OpenAI messages", "chat", ("messages",), _TOOLS),
    Shape("ShareGPT conversations", "chat", ("conversations",), ("system", *_TOOLS)),
    Shape("prompts and responses", "instruction", ("prompt", "response"), ("system", "history")),
    Shape("prompts and completions", "pair", ("prompt", "completion"), _TOOLS),
    Shape("Alpaca instructions", "instruction", ("instruction", "output"), _ALPACA),
    Shape("instructions and responses", "instruction", ("instruction", "response"), _ALPACA),
    Shape("questions and answers", "instruction", ("question", "answer"), ("system", "history")),
    Shape("inputs and outputs", "instruction", ("input", "output"), ("system", "history")),
    Shape("plain text", "text", ("text",)),
)
"""The first shape whose columns are all present applies."""


def known_shape(have: Sequence[str], kind: str, response: str | None = None) -> Shape | None:
    """Return the shape of rows with the columns ``have``; None if unknown.

    Args:
        have: names of columns.
        kind: kind of the task; text to text only takes a source and a target.
        response: the response column, if named.
    """
    for shape in SHAPES:
        paired = shape.form in ("instruction", "pair")
        columns = (shape.columns[0], response) if response and paired else shape.columns
        if set(columns) <= set(have) and (paired or kind == "causal"):
            return dataclasses.replace(shape, columns=columns)
    return None


def preference(have: Sequence[str]) -> bool:
    """Return whether rows are preference pairs."""
    return {"chosen", "rejected"} <= set(have)


def _chat(shape: Shape, raw: Mapping[str, Any], where: str) -> Row:
    messages = messages_of(raw[shape.columns[0]], where)
    system = _optional(shape, raw, "system", where)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    elif system and not messages[0]["content"]:
        messages[0]["content"] = system
    return _with_tools({"messages": messages}, shape, raw, where)


def _instruction(shape: Shape, raw: Mapping[str, Any], where: str) -> Row:
    prompt, response = (raw.get(column) for column in shape.columns)
    if isinstance(prompt, list) or isinstance(response, list):
        return _conversational(shape, raw, where)
    prompt = text_of(raw, shape.columns[0], where)
    if "input" not in shape.columns and (more := _optional(shape, raw, "input", where)):
        prompt = f"{prompt}\n\n{more}" if prompt.strip() else more
    row: Row = {"instruction": prompt, "response": text_of(raw, shape.columns[1], where)}
    if system := _optional(shape, raw, "system", where):
        row["system"] = system
    if history := _history(shape, raw, where):
        row["history"] = history
    return row


def _conversational(shape: Shape, raw: Mapping[str, Any], where: str) -> Row:
    """Convert TRL's conversational form; training only covers turns of the completion."""
    asked, answered = (
        messages_of([{"role": role, "content": value}] if isinstance(value, str) else value, where)
        for role, value in zip(
            ("user", "assistant"), (raw.get(column) for column in shape.columns), strict=True
        )
    )
    row = {"messages": asked + answered, "first": len(asked)}
    check_answers(answered, where)
    return _with_tools(row, shape, raw, where)


def _text(shape: Shape, raw: Mapping[str, Any], where: str) -> Row:
    return {"text": text_of(raw, shape.columns[0], where)}


_CONVERT: dict[str, Callable[[Shape, Mapping[str, Any], str], Row]] = {
    "chat": _chat,
    "instruction": _instruction,
    "pair": _instruction,
    "text": _text,
}


def _optional(shape: Shape, raw: Mapping[str, Any], column: str, where: str) -> str:
    if column not in shape.optional or raw.get(column) in (None, "", [], {}):
        return ""
    return text_of(raw, column, where)


def _history(shape: Shape, raw: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    pairs = parsed(raw.get("history")) if "history" in shape.optional else None
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(text, (str, int, float)) for text in pair)
        for pair in pairs
    ):
        raise DataError(
            f"{where}: column 'history' is {shortened(pairs)}; give a list of [question, answer]."
        )
    return [(str(question), str(answer)) for question, answer in pairs]


def _with_tools(row: Row, shape: Shape, raw: Mapping[str, Any], where: str) -> Row:
    check_answers(row["messages"], where)
    tools = tools_of(raw.get("tools"), where) if "tools" in shape.optional else None
    return row | ({"tools": tools} if tools else {})
