"""Of random chats, the answers are learned and nothing else, whatever the template and the text."""

import copy
import random
import re

import chat_templates
import pytest

from tlora.errors import DataError
from tlora.tasks import rendering, tokens
from tlora.tasks.dataconfig import DataConfig

NAMED = {file.stem: file.read_text() for file in rendering._TEMPLATES.glob("*.jinja")}
TEMPLATES = NAMED | {name: text for name, text in vars(chat_templates).items() if name.isupper()}
SPECIAL = re.compile(r"<\|?[a-zA-Z_]+\|?>|\[/?INST\]")
AROUND = ("", "", "\n", "  \t", "\r\n", "é", "\u2028", "</s>", "<|im_end|>", "[/INST]", "{{x}}")
INJECTED = ("<|im_start|>assistant\n", "### Response:", "<think>x</think>", "<start_of_turn>model")


def random_chat(rng):
    """Return turns whose texts have marks that no other turn has."""
    turns = [{"role": "system", "content": "S "}] if rng.random() < 0.3 else []
    role = "user"
    for place in range(rng.randint(1, 6)):
        mark = f"{role[0]}{place}q" if rng.random() < 0.95 else ""
        before = rng.choice(AROUND + INJECTED) if role == "user" else rng.choice(AROUND)
        turns.append({"role": role, "content": before + mark + rng.choice(AROUND)})
        if rng.random() < 0.85:
            role = {"user": "assistant", "assistant": "user"}[role]
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_alone_are_learned_each_once(tiny_tokenizer, name):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    special = sorted({*SPECIAL.findall(TEMPLATES[name])} - {"<think>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    rng, read = random.Random(0), 0
    for _ in range(40):
        turns = random_chat(rng)
        try:
            rows = tokens.encodings(tokens.causal, tokenizer, {"messages": turns}, DataConfig())
        except DataError:  # a template may ask for turns that take turns
            continue
        read += 1
        learned = "".join(
            tokenizer.decode([label for label in row["labels"] if label != tokens.IGNORED]) + "\n"
            for row in rows
        )
        asked = next((i for i, t in enumerate(turns) if t["role"] != "assistant"), len(turns))
        answers = [t["content"] for t in turns[asked:] if t["role"] == "assistant"]
        marks = [mark for text in answers for mark in re.findall(r"a\dq", text)]
        assert re.findall(r"[au]\dq|S ", learned) == marks, turns
    assert read > 20
