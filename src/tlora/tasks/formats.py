"""Write rows as text, as `data.format` selects.

- "chat": messages, which the model's chat template renders (`tlora.tasks.rendering`);
- "alpaca": the paper's instruction prompt; the response follows on the next line;
- "raw": the prompt, directly followed by the response.

"auto" uses the chat template if the model has one, else the Alpaca prompt; it leaves plain text
and TRL's prompt-completion pairs unchanged.
"""

from __future__ import annotations

from typing import Any

from tlora.tasks.base import INSTRUCTION_PROMPT, Row
from tlora.tasks.dataconfig import Format

TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:"
"""Start of a later turn in the Alpaca format, after the previous answer."""

SAYS: dict[Format, str] = {
    "chat": "formatted by the model's chat template",
    "alpaca": "formatted as Alpaca prompts",
    "raw": "used unchanged",
}
"""Description of each format in log lines."""


def write(form: Row, style: Format, system: str | None = None) -> Row:
    """Return a task row: messages, a prompt with its response, or a text.

    Args:
        form: a row as converted by its shape.
        style: "chat", "alpaca" or "raw".
        system: the system message for rows without one.
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
    """Put the line break before the answer into the response, so prompts equal the paper's."""
    system = form.get("system") or system
    text, prompt = f"{system}\n\n" if system else "", INSTRUCTION_PROMPT
    for question, answer in form.get("history", ()):
        text += f"{prompt.format(instruction=question.strip())}\n{answer.strip()}"
        prompt = TURN
    text += prompt.format(instruction=form["instruction"].strip())
    return {"prompt": text, "response": f"\n{form['response'].strip()}"}
