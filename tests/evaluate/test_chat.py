"""Conversations become prompts: a chat template's, or the paper's."""

import copy

import pytest

from tlora.evaluate.conversations import INSTRUCTION, TEMPLATE
from tlora.tasks.base import INSTRUCTION_PROMPT

CHAT = [
    {"role": "user", "content": "One {x}?"},
    {"role": "assistant", "content": "Yes, {y}."},
    {"role": "user", "content": "Two?"},
]


@pytest.fixture
def chatty(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def test_a_chat_template_asks_for_the_next_answer(chatty):
    assert TEMPLATE.render(chatty, CHAT) == (
        "<user>One {x}?\n<assistant>Yes, {y}.\n<user>Two?\n<assistant>"
    )


def test_the_papers_prompt_puts_the_first_turn_before_the_second(tiny_tokenizer):
    first = INSTRUCTION_PROMPT.format(instruction="One {x}?")
    assert INSTRUCTION.render(tiny_tokenizer, CHAT[:1]) == first
    assert INSTRUCTION.render(tiny_tokenizer, CHAT) == (
        f"{first}Yes, {{y}}.\n\n### Instruction:\nTwo?\n\n### Response:"
    )
    system = {"role": "system", "content": "Be brief."}
    assert INSTRUCTION.render(tiny_tokenizer, [system, *CHAT[:1]]) == f"Be brief.\n\n{first}"
