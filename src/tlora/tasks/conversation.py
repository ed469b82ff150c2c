"""Convert chats in common file formats into messages for chat templates.

A message is {"role", "content"} with the roles system, user, assistant and tool, its content text.
An assistant turn that calls tools has "tool_calls", whose arguments are a dict; its content may be
None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tlora.errors import DataError, shortened

Message = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    "function_call": "function_call",
    "function": "tool",
}
"""Speaker names in ShareGPT, OpenAI and derived formats."""
_SPEAKER, _SAYS = ("role", "from"), ("content", "value")


def messages_of(value: Any, where: str) -> list[Message]:
    """Return the messages in a list of {role, content} or {from, value}, or in its JSON.

    Raises:
        DataError: the value is another, a speaker is unknown, or content is not text.
    """
    value = parsed(value)
    turns = value if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{where}: the chat is {shortened(value)}; give a list of {{role, content}} or"
            " {from, value}."
        )
    return [_message(turn, where) for turn in turns]


def tools_of(value: Any, where: str) -> list[Any] | None:
    """Return the tools in a column that holds a list or its JSON; None if empty.

    Raises:
        DataError: the column holds something else.
    """
    value = parsed(value)
    if not value:
        return None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: column 'tools' is {shortened(value)}; give a list of tools, or its JSON."
        )
    return [_without_none(tool) for tool in tools]


def parsed(value: Any) -> Any:
    """Parse JSON text, as in table cells; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def check_answers(messages: list[Message], where: str) -> None:
    """Check that the chat has an assistant turn.

    Raises:
        DataError: there is none.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: the chat has no assistant turn to train on; drop the row.")


def _message(turn: Mapping[str, Any], where: str) -> Message:
    speaker, value = (
        next((turn[name] for name in names if turn.get(name) is not None), None)
        for names in (_SPEAKER, _SAYS)
    )
    role = _ROLES.get(str(speaker).lower())
    if role is None:
        known = ", ".join(_ROLES)
        raise DataError(
            f"{where}: the chat has a turn by {speaker!r}: {shortened(turn)}; use one of {known}."
        )
    if role == "function_call":
        return {"role": "assistant", **_called(value, where)}
    # `datasets` fills fields missing from a row with None, which breaks templates.
    rest = _without_none({k: v for k, v in turn.items() if k not in (*_SPEAKER, *_SAYS)})
    calls = rest.pop("tool_calls", None) or rest.pop("function_call", None)
    if value is None and not calls and not {*_SAYS} & {*turn}:
        raise DataError(
            f"{where}: a turn has no text: {shortened(turn)}; store the text in `content` or"
            " `value`."
        )
    message: Message = {"role": role, "content": _text(value, where), **rest}
    if calls:
        message["tool_calls"] = _tool_calls(calls, where)
        message["content"] = message["content"] or None
    return message


def _text(content: Any, where: str) -> str:
    """Return the text of a message, or the joined lines of a list of parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("text") is not None for part in content):
            raise DataError(
                f"{where}: a turn contains {shortened(content)}; training only supports text, so"
                " drop the row, or its images and audio."
            )
        return "\n".join(str(part["text"]) for part in content)
    if isinstance(content, dict):
        raise DataError(f"{where}: a turn is {shortened(content)}, not text; fix or drop the row.")
    return str(content)


def _called(value: Any, where: str) -> Message:
    """Return the message of a ShareGPT `function_call`, whose value is JSON or plain text."""
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return {"content": _text(value, where)}
    return {"content": None, "tool_calls": _tool_calls(calls, where)}


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form, with arguments as dicts for the template."""
    calls = parsed(value)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: a turn has the tool call {shortened(call)}; give a list of"
                " {function: {name, arguments}}."
            )
        arguments = parsed(function.get("arguments"))
        function = function | {"arguments": {} if arguments is None else arguments}
        own = {k: v for k, v in call.items() if k != "function"} if "function" in call else {}
        found.append({"type": "function", **own, "function": function})
    return found


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    return value
