"""How rows are written as text: `data.format`.

- "chat": messages, which the model's chat template renders (`tlora.tasks.rendering`);
- "alpaca": the paper's instruction prompt; the response follows on a line of its own;
- "raw": the prompt as it stands, the response right behind it.

"auto" is the chat template where the model has one and else the Alpaca prompt; prompts with
completions, as TRL has them, and texts stand as they are.
"""

from __future__ import annotations

from typing import Any

from tlora.tasks.base import INSTRUCTION_PROMPT, Row
from tlora.tasks.dataconfig import Format

TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:"
"""What the Alpaca prompt of a later turn begins with, after the answer to the one before."""

SAYS: dict[Format, str] = {
    "chat": "written by the model's chat template",
    "alpaca": "written as Alpaca prompts",
    "raw": "trained on as they are",
}
"""What a line says of a format."""


def write(form: Row, style: Format, system: str | None = None) -> Row:
    """Return the row of a task: messages, or a prompt with its response, or a text.

    Args:
        form: what a shape made of a row.
        style: "chat", "alpaca" or "raw".
        system: the system message of rows that have none.
    """
    if "text" in form:
        return form
    if "messages" in form:
        return _with_system(form, system)
    if style == "chat":
        return _with_system({"messages": as_messages(form)}, system)
    if style == "alpaca":
        return _alpaca(form, system)
    said = [text for pair in form.get("history", ()) for text in pair]
    prompt = "\n\n".join(filter(None, [form.get("system") or system, *said, form["instruction"]]))
    return {"prompt": prompt, "response": form["response"]}


def as_messages(form: Row) -> list[dict[str, Any]]:
    """Return an instruction and its response as a chat."""
    turns = [*form.get("history", ()), (form["instruction"], form["response"])]
    messages = [{"role": "system", "content": form["system"]}] if form.get("system") else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question.strip()})
        messages.append({"role": "assistant", "content": answer.strip()})
    return messages


def _with_system(row: Row, system: str | None) -> Row:
    messages = row["messages"]
    if not system or messages[0]["role"] == "system":
        return row
    shifted = {"first": row["first"] + 1} if "first" in row else {}
    return row | {"messages": [{"role": "system", "content": system}, *messages]} | shifted


def _alpaca(form: Row, system: str | None) -> Row:
    """The line break before the answer belongs to the response, so that prompts are the paper's."""
    system = form.get("system") or system
    text, prompt = f"{system}\n\n" if system else "", INSTRUCTION_PROMPT
    for question, answer in form.get("history", ()):
        text += f"{prompt.format(instruction=question.strip())}\n{answer.strip()}"
        prompt = TURN
    text += prompt.format(instruction=form["instruction"].strip())
    return {"prompt": text, "response": f"\n{form['response'].strip()}"}
