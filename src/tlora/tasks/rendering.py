"""Render chats with a chat template, and find the characters to train on.

If the template marks the assistant's turns ({% generation %}), those marks decide. Otherwise
prefixes do: the model writes turn i between the rendering of the earlier turns with a generation
prompt and the rendering of the turns up to i. This requires both to be prefixes of the rendering of
the whole chat. Templates that rewrite earlier turns (Qwen 3 drops their thinking) violate it;
`turns` then makes one row per answer, rendered as at inference.
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
"""First character to train on, and the one after the last."""
Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
"""(messages, whether to add a generation prompt) -> text."""

NO_TEMPLATE = (
    "the model's tokenizer has no chat template, but the rows are chats; give --data.chat_template"
    " chatml (or another name, or a file), or use a chat model."
)

_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
_WRITES_TOOLS = "--data.chat_template qwen, or another template that does"
_FIELDS = {
    "tool_calls": _WRITES_TOOLS,
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "another template, or move the text to `content`",
    ),
}
"""Fields of a chat besides its text, and the remedy if a template does not render them."""
_TEMPLATES = Path(__file__).with_name("templates")


def named_template(name: str) -> str:
    """Return the text of a chat template from a file or from `templates/`.

    Raises:
        ConfigError: there is no such file or template.
    """
    known = {file.stem: file for file in sorted(_TEMPLATES.glob("*.jinja"))}
    file = known.get(name, Path(name))
    if not file.is_file():
        raise ConfigError(
            f"`data.chat_template` is {name!r}; use a file, or one of {', '.join(known)}."
            f"{did_you_mean(name, known)}",
            where="data",
        )
    return file.read_text(encoding="utf-8")


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Set a tokenizer's chat template by name or from a file.

    Named templates start with the BOS token if the tokenizer starts every text with it.

    Raises:
        ConfigError: there is no such template or file.
    """
    text = named_template(name)
    opens = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if opens and not Path(name).is_file() and "bos_token" not in text:
        text = "{{- bos_token }}" + text
    tokenizer.chat_template = text


def turns(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Row]:
    """Return the chat unchanged, or one row per answer if the template rewrites earlier turns.

    Raises:
        DataError: the tokenizer has no chat template, or the template rejects the chat.
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
    """Return the text of a chat and the spans to train on.

    Args:
        tokenizer: the model's tokenizer.
        row: {"messages"} and optionally {"tools", "first"}, as `turns` returns it.

    Raises:
        DataError: the tokenizer has no chat template, or the template rejects the chat or
            renders an answer differently from its generation prompt.
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
        "the chat template renders an answer differently from its generation prompt, so the"
        " assistant's tokens cannot be located; use --data.loss_on all, or another"
        " --data.chat_template."
    )


def written(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: bool = False) -> str:
    """Return the text of a chat, with a generation prompt if ``prompt``.

    Raises:
        DataError: as `rendered`.
    """
    return _renderer(tokenizer, row)(row["messages"], prompt)


def stops(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that the template writes after an answer, without EOS; may be empty.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
    text = written(tokenizer, {"messages": turns}).rpartition("reply")[2].strip()
    text = text.removesuffix(tokenizer.eos_token or "").strip()
    return [text] if text else []


_RAISED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions of template expressions besides jinja's own errors."""


def _renderer(tokenizer: PreTrainedTokenizerBase, row: Row) -> Render:
    if tokenizer.chat_template is None:
        raise DataError(NO_TEMPLATE)

    _check_fields(tokenizer, row)
    return lambda messages, prompt: _accepted(tokenizer, row, messages, prompt)[1]


def _accepted(
    tokenizer: PreTrainedTokenizerBase, row: Row, messages: Messages, prompt: bool
) -> tuple[Messages, str]:
    """Return the messages in a form that the chat template accepts, and their rendering.

    Raises:
        DataError: the template accepts none.
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
        fault = ValueError("it omits a tool call")
    raise DataError(
        f"the chat template rejects the chat ({first_line(fault or ValueError()).rstrip('.')}):"
        f" {shortened(row['messages'])}; fix or drop the row, or use another"
        " --data.chat_template."
    ) from fault


def _forms(messages: Messages) -> Iterator[Messages]:
    """Yield the messages unchanged, then in the forms that some templates require.

    Most templates take tool call arguments as a dict, some as text; some cannot render a turn
    without content; templates of vision models read lists of parts.
    """
    yield messages
    if any(turn.get("tool_calls") for turn in messages):
        yield [turn | _texts(turn) for turn in messages]
        yield [turn | {"content": turn["content"] or ""} for turn in messages]
    yield [
        turn | {"content": [{"type": "text", "text": turn["content"] or ""}]} for turn in messages
    ]


def _holds(text: str, messages: Messages) -> bool:
    """Return whether a rendering contains every user text and called function."""
    said = [str(turn["content"]).strip() for turn in messages if turn["role"] == "user"]
    calls = [call for turn in messages for call in turn.get("tool_calls", ())]
    return all(part in text for part in [*said, *(call["function"]["name"] for call in calls)])


def _texts(turn: dict[str, Any]) -> dict[str, Any]:
    """Return the turn with tool call arguments as text."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(arguments)}}
        for call in turn.get("tool_calls", ())
        if (arguments := call["function"].get("arguments")) is not None
    ]
    return {"tool_calls": calls} if calls else {}


def _check_fields(tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """Check that the template renders a chat's tools, tool calls and reasoning."""
    template = " ".join(_template_texts(tokenizer))
    fields = {field for turn in row["messages"] for field in _FIELDS if turn.get(field)}
    unread = [
        name for name in _FIELDS if name in fields and not re.search(rf"[.'\"]{name}\b", template)
    ]
    if row.get("tools") and "tools" not in template:
        unread.insert(0, "tools")
    if unread:
        raise DataError(
            f"the chat has `{unread[0]}`, which the model's chat template does not render; remove"
            f" them, or use {_FIELDS.get(unread[0], _WRITES_TOOLS)}."
        )


def _template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template: Any = tokenizer.chat_template
    return [*template.values()] if isinstance(template, dict) else [template]


def _marked(tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(map(_MARKED.search, _template_texts(tokenizer)))


def _marks(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, list[Span]]:
    # The tokenizer's own mask treats a mark that ends in its first token as unclosed.
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
    asked = 0  # marks in turns not trained on; a turn may have several
    if any(turn["role"] == "assistant" for turn in before):
        asked = len(_marks(tokenizer, row | {"messages": before})[1])
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    if not all(map(_counts, answers)):
        if len(spans) != len(answers):
            raise DataError(
                "the chat has turns of weight 0, but the chat template does not mark whole turns;"
                " drop them, or use another --data.chat_template."
            )
        spans = [
            span if _counts(turn) else (0, 0) for span, turn in zip(spans, answers, strict=True)
        ]
    return text, spans[asked:]


def _counts(turn: dict[str, Any]) -> bool:
    """Return whether to train on a turn; OpenAI's format excludes turns with weight 0."""
    return turn.get("weight") != 0


def _opened(messages: Messages) -> int:
    """Return the number of assistant turns at the start of a chat, which answer no one."""
    speakers = [message["role"] for message in messages]
    return next((i for i, who in enumerate(speakers) if who != "assistant"), len(speakers))


def _answers(messages: Messages, first: int) -> list[int]:
    """Return the indices of turns to train on, starting at ``first``."""
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
    """Return the spans to train on; None if a rendered prefix is not a prefix of the whole."""
    whole = render(messages, False)
    found = []
    for place in _answers(messages, first):
        try:
            before = render(messages[:place], True)
            upto = render(messages[: place + 1], False)
        except DataError:  # the template requires a whole chat
            return None
        if not whole.startswith(upto) and tokenizer.eos_token:
            # Some templates close a chat, and thus each prefix, with a special token.
            upto = upto.rstrip().removesuffix(tokenizer.eos_token)
        if not (whole.startswith(before) and whole.startswith(upto)):
            return None
        found += _trimmed(whole, len(before), len(upto))
    return found


def _last_answer(render: Render, messages: Messages, whole: str) -> tuple[str, list[Span]] | None:
    """Return text and spans of a chat whose last answer does not continue its prompt.

    DeepSeek R1's template opens the thinking in its prompt and omits it from answers: training
    covers the text after both diverge. Mistral's writes the system message only before a final
    question: the answer then follows the prompt, as at inference.
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
    """Return a span without trailing white space, which a model does not generate after EOS."""
    end = start + len(text[start:end].rstrip())
    return [(start, end)] if end > start else []
