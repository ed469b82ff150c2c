"""Base of the paper's instruction tasks: an instruction, a response, one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tlora.errors import DataError
from tlora.tasks.base import INSTRUCTION_PROMPT, Row, Task, text_of
from tlora.tasks.dataconfig import Format, Kind


class Layout(NamedTuple):
    """Columns of one published row format.

    The prompt holds ``instruction``, then ``input`` after a blank line if the row has one;
    ``response`` is the training target.
    """

    instruction: str
    response: str
    input: str | None = None


class Instruct(Task):
    """Instructions and responses in one of several layouts, with the paper's prompt.

    A subclass lists its layouts; the first one whose columns are present applies.
    """

    kind: Kind = "causal"
    formats: tuple[Format, ...] = ("alpaca", "raw")
    reads = ("loss_on",)
    layouts: tuple[Layout, ...] = (Layout("instruction", "output", "input"),)

    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return {"prompt", "response"}."""
        layout = self._layout(raw, where)
        instruction = text_of(raw, layout.instruction, where).strip()
        if layout.input and raw.get(layout.input):
            instruction = f"{instruction}\n\n{text_of(raw, layout.input, where).strip()}"
        if not instruction:
            raise DataError(f"{where}: column {layout.instruction!r} is empty; drop the row.")
        response = self.response(text_of(raw, layout.response, where), where)
        return {"prompt": INSTRUCTION_PROMPT.format(instruction=instruction), "response": response}

    def response(self, text: str, where: str) -> str:
        """Return the training target for a response; unchanged by default.

        Raises:
            DataError: the response is not in the task's format.
        """
        return text.strip()

    def _layout(self, raw: Mapping[str, Any], where: str) -> Layout:
        for layout in self.layouts:
            if layout.instruction in raw and layout.response in raw:
                return layout
        wanted = "; ".join(f"{each.instruction!r} and {each.response!r}" for each in self.layouts)
        have = ", ".join(map(repr, raw))
        raise DataError(
            f"{where}: the columns are {have}, but this task reads {wanted}; for other columns, use"
            " --task jsonl with --data.prompt_column and --data.response_column."
        )
