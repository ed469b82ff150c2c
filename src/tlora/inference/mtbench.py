"""A model's answers to MT-Bench: both turns, the second after the model's own first answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlora.evaluation.mtbench.judging import Answered
from tlora.evaluation.mtbench.questions import Question, temperature
from tlora.inference.chat import ChatForm, Decoding, Messages, Written, write_replies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asking:
    """How the questions are put."""

    form: ChatForm
    decoding: Decoding = field(default_factory=Decoding)
    greedy: bool = False
    """Temperature 0 for all, in place of the published ones by category."""
    system: str | None = None
    """A system message before the first turn."""


@dataclass(frozen=True)
class Answers:
    """What a model wrote."""

    answered: list[Answered]
    shortened: int
    """How many prompts lost their beginning for the model's context."""


def answer(
    questions: Sequence[Question], model: Any, tokenizer: PreTrainedTokenizerBase, asking: Asking
) -> Answers:
    """Have a model answer the first turns of all questions, then the second ones.

    Source: the temperatures and the two turns are those of FastChat, published with arXiv
    2306.05685; departure: questions are answered in batches, so samples are not drawn alike.
    """
    chats: list[Messages] = [
        [{"role": "system", "content": asking.system}] if asking.system else [] for _ in questions
    ]
    prompts: list[list[str]] = []
    written: list[Written] = []
    for turn in (0, 1):
        for chat, question in zip(chats, questions, strict=True):
            chat.append({"role": "user", "content": question.turns[turn]})
        prompts.append([asking.form.render(tokenizer, chat) for chat in chats])
        heat = [0.0 if asking.greedy else temperature(question) for question in questions]
        asked = list(zip(prompts[turn], heat, strict=True))
        written.append(write_replies(model, tokenizer, asked, asking.form, asking.decoding))
        for chat, reply in zip(chats, written[turn].replies, strict=True):
            chat.append({"role": "assistant", "content": reply})
    first, second = written
    answered = [
        Answered(*each)
        for each in zip(
            questions,
            zip(first.replies, second.replies, strict=True),
            zip(*prompts, strict=True),
            strict=True,
        )
    ]
    return Answers(answered, first.shortened + second.shortened)
