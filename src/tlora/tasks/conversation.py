"""Turns of a chat, as people's files have them -> messages, as chat templates read them.

A message is {"role", "content"} with the roles system, user, assistant and tool, its content text.
An assistant that calls tools has "tool_calls", whose arguments are a dict, and says nothing (None)
or something.
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
"""Names of speakers that ShareGPT, OpenAI and their descendants use."""
_SPEAKER, _SAYS = ("role", "from"), ("content", "value")


def messages_of(value: Any, where: str) -> list[Message]:
    """Return the messages of a list of {role, content} or of {from, value}, or of its JSON.

    Raises:
        DataError: it is no such list, a speaker is unknown, or content is not text.
    """
    value = parsed(value)
    turns = value if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{where}: the chat is {shortened(value)}; give a list of {{role, content}} or of"
            " {from, value}."
        )
    return [_message(turn, where) for turn in turns]


def tools_of(value: Any, where: str) -> list[Any] | None:
    """Return the tools that a column holds as a list or as its JSON; None if it has none.

    Raises:
        DataError: it is neither.
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
    """Return what a JSON text holds, as cells of tables do; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def check_answers(messages: list[Message], where: str) -> None:
    """Check that there is something to learn.

    Raises:
        DataError: no assistant speaks.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: the chat has no assistant turn to learn from; drop the row.")


def _message(turn: Mapping[str, Any], where: str) -> Message:
    speaker, value = (
        next((turn[name] for name in names if turn.get(name) is not None), None)
        for names in (_SPEAKER, _SAYS)
    )
    role = _ROLES.get(str(speaker).lower())
    if role is None:
        known = ", ".join(_ROLES)
        raise DataError(
            f"{where}: the chat has a turn of {speaker!r}: {shortened(turn)}; known are {known}."
        )
    if role == "function_call":
        return {"role": "assistant", **_called(value, where)}
    # `datasets` fills fields that only other rows have with None, which templates stumble over.
    rest = _without_none({k: v for k, v in turn.items() if k not in (*_SPEAKER, *_SAYS)})
    calls = rest.pop("tool_calls", None) or rest.pop("function_call", None)
    if value is None and not calls and not {*_SAYS} & {*turn}:
        raise DataError(
            f"{where}: a turn says nothing: {shortened(turn)}; give its text as `content` or"
            " `value`."
        )
    message: Message = {"role": role, "content": _text(value, where), **rest}
    if calls:
        message["tool_calls"] = _tool_calls(calls, where)
        message["content"] = message["content"] or None
    return message


def _text(content: Any, where: str) -> str:
    """Return the text of a message; of a list of parts, their texts on lines of their own."""
    if content is None:
        return ""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("text") is not None for part in content):
            raise DataError(
                f"{where}: a turn holds {shortened(content)}; only text is trained on, so drop the"
                " row, or its images and sounds."
            )
        return "\n".join(str(part["text"]) for part in content)
    if isinstance(content, dict):
        raise DataError(f"{where}: a turn is {shortened(content)}, not text; fix or drop the row.")
    return str(content)


def _called(value: Any, where: str) -> Message:
    """Return content and tool calls of ShareGPT's `function_call`: JSON, or else plain text."""
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return {"content": _text(value, where)}
    return {"content": None, "tool_calls": _tool_calls(calls, where)}


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return calls in OpenAI's form, their arguments as dicts: templates write them as JSON."""
    calls = parsed(value)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: a turn calls {shortened(call)}; give a list of"
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
