"""How a conversation becomes a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.tasks.base import INSTRUCTION_PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatForm:
    """One way to write a conversation as a text that the model goes on with."""

    says: str
    """What it is, for a result's protocol line."""
    render: Callable[[Any, Messages], str]
    """(tokenizer, messages of which the user's is last) -> the prompt."""
    stops: tuple[str, ...] = ()
    """Texts that a reply ends before."""


_TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:"


def _templated(tokenizer: Any, messages: Messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _instructed(_: Any, messages: Messages) -> str:
    text, prompt = "", INSTRUCTION_PROMPT
    for message in messages:
        if message["role"] == "system":
            text += f"{message['content']}\n\n"
        elif message["role"] == "assistant":
            text += message["content"]
        else:
            text += prompt.format(instruction=message["content"])
            prompt = _TURN
    return text


TEMPLATE = ChatForm("the model's chat template", _templated)
INSTRUCTION = ChatForm(
    "the instruction prompt of arXiv 2604.18124, the first turn standing before the second",
    _instructed,
    stops=("### Instruction:",),
)
FORMS = {"template": TEMPLATE, "instruction": INSTRUCTION}


def form_of(tokenizer: PreTrainedTokenizerBase) -> ChatForm:
    """Return the tokenizer's chat template, or without one the paper's instruction prompt."""
    return TEMPLATE if tokenizer.chat_template else INSTRUCTION
