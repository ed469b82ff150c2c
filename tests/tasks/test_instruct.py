"""The paper's training sets, each in its published layout, in the paper's prompt."""

from __future__ import annotations

import pytest

from tlora.registry import TASKS
from tlora.tasks.base import INSTRUCTION_PROMPT
from tlora.tasks.dataconfig import DataConfig

PUBLISHED = {
    "math": {"query": "What is 2+2?", "response": "2+2=4. The answer is: 4", "type": "GSM_AnsAug"},
    "code": {"query": "Print 1.", "answer": "print(1)", "lang": "python"},
    "chat": {
        "idx": "x",
        "conversations": [
            {"from": "human", "value": "Hello?"},
            {"from": "gpt", "value": "Hi."},
            {"from": "human", "value": "Bye."},
        ],
    },
    "commonsense": {
        "instruction": "Is ice cold?\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    },
}
EXPECTED = {
    "math": ("What is 2+2?", "2+2=4. The answer is: 4"),
    "code": ("Print 1.", "print(1)"),
    "chat": ("Hello?", "Hi."),
    "commonsense": ("Is ice cold?\n\nAnswer format: true/false", "the correct answer is true"),
}


def row(name: str, raw: dict) -> dict:
    return TASKS.load(name)(DataConfig()).row(raw, "rows, row 3")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_becomes_the_papers_prompt_and_the_response_as_it_is(name):
    instruction, response = EXPECTED[name]
    prompt = INSTRUCTION_PROMPT.format(instruction=instruction)
    assert row(name, PUBLISHED[name]) == {"prompt": prompt, "response": response}


@pytest.mark.parametrize("name", ["math", "code", "chat"])
def test_an_input_follows_the_instruction(name):
    made = row(name, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert made["prompt"] == INSTRUCTION_PROMPT.format(instruction="Add.\n\n1 2")
