"""Chats -> text by a chat template, and which of its characters the assistant learns.

Where the template marks the assistant's turns ({% generation %}), the marks say it. Else prefixes
do: what the model writes in turn i lies between the rendering of the turns before it, prompted
for an answer, and the rendering of the turns up to it. That holds only if both are prefixes of the
rendering of the whole chat. Templates that rewrite earlier turns (Qwen 3 drops their thinking)
break it; `turns` then makes one row of each answer, rendered as at inference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError, did_you_mean, first_line, shortened
from tlora.tasks.base import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character that is learned, and the one behind the last."""
Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
"""(messages, whether to prompt for an answer) -> text."""

NO_TEMPLATE = (
    "the model's tokenizer has no chat template, which chats need; give --data.chat_template chatml"
    " (or another name, or a file), or a chat model."
)

_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
_WRITES_TOOLS = "--data.chat_template qwen, or another that does"
_FIELDS = {
    "tool_calls": _WRITES_TOOLS,
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "another template, or make them `content`"
    ),
}
"""What an assistant may do besides answering, and what to do where a template does not write it."""
_TEMPLATES = Path(__file__).with_name("templates")


def named_template(name: str) -> str:
    """Return the text of a chat template: a file's, or one of those in `templates/`.

    Raises:
        ConfigError: it is neither.
    """
    known = {file.stem: file for file in sorted(_TEMPLATES.glob("*.jinja"))}
    file = known.get(name, Path(name))
    if not file.is_file():
        raise ConfigError(
            f"`data.chat_template` is {name!r}; give a file, or one of {', '.join(known)}."
            f"{did_you_mean(name, known)}",
            where="data",
        )
    return file.read_text(encoding="utf-8")


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer a chat template by name, or that of a file.

    Those by name begin with the opening token where the tokenizer opens every text with it.

    Raises:
        ConfigError: it is neither a name nor a file.
    """
    text = named_template(name)
    opens = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if opens and not Path(name).is_file() and "bos_token" not in text:
        text = "{{- bos_token }}" + text
    tokenizer.chat_template = text


def turns(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Row]:
    """Return a chat as it is, or if its template rewrites earlier turns, a row for each answer.

    Raises:
        DataError: the tokenizer has no template, or it refuses the chat.
    """
    render = _renderer(tokenizer, row)
    messages = row["messages"]
    if _marked(tokenizer) or _spans(render, messages, row.get("first", 0), tokenizer) is not None:
        return [row]
    return [
        row | {"messages": messages[: place + 1], "first": place}
        for place in _answers(messages, row.get("first", 0))
    ]


def rendered(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, list[Span]]:
    """Return the text of a chat and what of it is learned.

    Args:
        tokenizer: the model's.
        row: {"messages"}, maybe {"tools", "first"}, as `turns` returns it.

    Raises:
        DataError: the tokenizer has no template, it refuses the chat, or it writes an answer in
            another way than it prompts for one.
    """
    render, messages, first = _renderer(tokenizer, row), row["messages"], row.get("first", 0)
    if _marked(tokenizer):
        return _by_marks(tokenizer, row)
    whole = render(messages, False)
    spans = _spans(render, messages, first, tokenizer)
    if spans is not None:
        return whole, spans
    if first == len(messages) - 1 and (found := _last_answer(render, messages, whole)):
        return found
    raise DataError(
        "the chat template writes an answer in another way than it prompts for one, so what"
        " the assistant says cannot be told apart; give --data.loss_on all, or another"
        " --data.chat_template."
    )


def written(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: bool = False) -> str:
    """Return the text of a chat, with what asks for an answer behind it if ``prompt``.

    Raises:
        DataError: as `rendered`.
    """
    return _renderer(tokenizer, row)(row["messages"], prompt)


def stops(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what the chat template writes after an answer, without the closing token; maybe [].

    Raises:
        DataError: the tokenizer has no template.
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
    text = written(tokenizer, {"messages": turns}).rpartition("reply")[2].strip()
    text = text.removesuffix(tokenizer.eos_token or "").strip()
    return [text] if text else []


_RAISED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the expressions of a template raise beside jinja's own errors."""


def _renderer(tokenizer: PreTrainedTokenizerBase, row: Row) -> Render:
    if tokenizer.chat_template is None:
        raise DataError(NO_TEMPLATE)

    _check_fields(tokenizer, row)
    return lambda messages, prompt: _accepted(tokenizer, row, messages, prompt)[1]


def _accepted(
    tokenizer: PreTrainedTokenizerBase, row: Row, messages: Messages, prompt: bool
) -> tuple[Messages, str]:
    """Return the form of messages that the chat template takes, and what it writes of it.

    Raises:
        DataError: it takes none.
    """
    from jinja2 import TemplateError

    fault: Exception | None = None
    taken: tuple[Messages, str] | None = None
    for form in _forms(messages):
        try:
            text = str(
                tokenizer.apply_chat_template(
                    form, tools=row.get("tools"), tokenize=False, add_generation_prompt=prompt
                )
            )
        except (TemplateError, *_RAISED) as error:
            fault = fault or error
            continue
        if _holds(text, messages):
            return form, text
        taken = taken or (form, text)
    if taken is not None and not any(turn.get("tool_calls") for turn in messages):
        return taken
    if taken is not None:
        fault = ValueError("it leaves out a tool call")
    raise DataError(
        f"the chat template refuses the chat ({first_line(fault or ValueError()).rstrip('.')}):"
        f" {shortened(row['messages'])}; fix or drop the row, or give another"
        " --data.chat_template."
    ) from fault


def _forms(messages: Messages) -> Iterator[Messages]:
    """Yield the messages as they are, then in the forms that some templates want.

    Most take the arguments of a call as a dict, some as text; some cannot write a turn without
    content; those of models that see images read lists of parts.
    """
    yield messages
    if any(turn.get("tool_calls") for turn in messages):
        yield [turn | _texts(turn) for turn in messages]
        yield [turn | {"content": turn["content"] or ""} for turn in messages]
    yield [
        turn | {"content": [{"type": "text", "text": turn["content"] or ""}]} for turn in messages
    ]


def _holds(text: str, messages: Messages) -> bool:
    """Return whether a rendering has what users say and the functions that are called."""
    said = [str(turn["content"]).strip() for turn in messages if turn["role"] == "user"]
    calls = [call for turn in messages for call in turn.get("tool_calls", ())]
    return all(part in text for part in [*said, *(call["function"]["name"] for call in calls)])


def _texts(turn: dict[str, Any]) -> dict[str, Any]:
    """Return the tool calls of a turn with arguments as text."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(arguments)}}
        for call in turn.get("tool_calls", ())
        if (arguments := call["function"].get("arguments")) is not None
    ]
    return {"tool_calls": calls} if calls else {}


def _check_fields(tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """Check that the template writes a chat's tools, calls and thoughts, not to drop them."""
    template = " ".join(_template_texts(tokenizer))
    fields = {field for turn in row["messages"] for field in _FIELDS if turn.get(field)}
    unread = [
        name for name in _FIELDS if name in fields and not re.search(rf"[.'\"]{name}\b", template)
    ]
    if row.get("tools") and "tools" not in template:
        unread.insert(0, "tools")
    if unread:
        raise DataError(
            f"the chat has `{unread[0]}`, which the model's chat template does not write; drop"
            f" them, or give {_FIELDS.get(unread[0], _WRITES_TOOLS)}."
        )


def _template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template: Any = tokenizer.chat_template
    return [*template.values()] if isinstance(template, dict) else [template]


def _marked(tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(map(_MARKED.search, _template_texts(tokenizer)))


def _marks(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, list[Span]]:
    # The tokenizer's own mask takes a mark that ends in its first token for one without an end.
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = row.get("tools")
    form, _ = _accepted(tokenizer, row, row["messages"], False)
    texts, marks = render_jinja_template(
        conversations=[form],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(start, end) for start, end in marks[0]]


def _by_marks(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, list[Span]]:
    text, spans = _marks(tokenizer, row)
    before = row["messages"][: max(row.get("first", 0), _opened(row["messages"]))]
    asked = 0  # marks of the turns that are not learned: a turn may have several
    if any(turn["role"] == "assistant" for turn in before):
        asked = len(_marks(tokenizer, row | {"messages": before})[1])
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    if not all(map(_counts, answers)):
        if len(spans) != len(answers):
            raise DataError(
                "the chat has turns of weight 0, but the chat template marks no turn as a whole;"
                " drop them, or give another --data.chat_template."
            )
        spans = [
            span if _counts(turn) else (0, 0) for span, turn in zip(spans, answers, strict=True)
        ]
    return text, spans[asked:]


def _counts(turn: dict[str, Any]) -> bool:
    """Return whether a turn is to be learned: OpenAI's files give those that are not weight 0."""
    return turn.get("weight") != 0


def _opened(messages: Messages) -> int:
    """Return how many turns of the assistant open a chat: they answer nobody."""
    speakers = [message["role"] for message in messages]
    return next((i for i, who in enumerate(speakers) if who != "assistant"), len(speakers))


def _answers(messages: Messages, first: int) -> list[int]:
    """Return the places of the turns that are learned, from ``first`` on."""
    return [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
        and place >= max(first, _opened(messages))
        and _counts(message)
    ]


def _spans(
    render: Render, messages: Messages, first: int, tokenizer: PreTrainedTokenizerBase
) -> list[Span] | None:
    """Return what is learned; None if a prefix's rendering is no prefix of the whole."""
    whole = render(messages, False)
    found = []
    for place in _answers(messages, first):
        try:
            before = render(messages[:place], True)
            upto = render(messages[: place + 1], False)
        except DataError:  # the template wants a whole chat
            return None
        if not whole.startswith(upto) and tokenizer.eos_token:
            # Some close a chat, and so each prefix, by a token of its own.
            upto = upto.rstrip().removesuffix(tokenizer.eos_token)
        if not (whole.startswith(before) and whole.startswith(upto)):
            return None
        found += _trimmed(whole, len(before), len(upto))
    return found


def _last_answer(render: Render, messages: Messages, whole: str) -> tuple[str, list[Span]] | None:
    """Return text and learned spans of a chat whose last answer does not continue its prompt.

    DeepSeek R1's template opens the thinking in its prompt and leaves it out of answers: learned is
    what follows where both part. Mistral's writes the system message before a question at the very
    end alone: the answer then follows the prompt, as at inference.
    """
    prompt, bare = render(messages[:-1], True), render(messages[:-1], False)
    if whole.startswith(bare):
        pairs = zip(prompt, whole, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
        return (whole, _trimmed(whole, same, len(whole))) if same > len(bare) else None
    asked = prompt[prompt.rfind(str(messages[-2]["content"]).strip()) :]
    place = whole.rfind(asked)
    if not asked or place < 0:
        return None
    text = prompt + whole[place + len(asked) :]
    return text, _trimmed(text, len(prompt), len(text))


def _trimmed(text: str, start: int, end: int) -> list[Span]:
    """Return a span without the white space behind it, which no model writes after its end."""
    end = start + len(text[start:end].rstrip())
    return [(start, end)] if end > start else []
