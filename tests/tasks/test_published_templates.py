"""Masks of the chat templates that TRL carries, against those of its marked versions."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import trl
from chats import CALLS, CHAT, SYSTEM, THOUGHT

from tlora.tasks import tokens
from tlora.tasks.dataconfig import DataConfig

FOLDER = Path(trl.__file__).parent / "chat_templates"
FAMILIES = ["gemma3", "llama3", "phi3", "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_vl"]
TOOL = {"type": "function", "function": {"name": "get", "description": "", "parameters": {}}}
ROWS = {
    "two turns": {"messages": CHAT},
    "system": {"messages": [SYSTEM, *CHAT]},
    "thinking": {"messages": THOUGHT},
}


@pytest.fixture
def learned(tiny_tokenizer):
    def of(name, row):
        """Return what each answer teaches, without white space around it."""
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        names = re.findall(r"<\|?\w+\|?>", tokenizer.chat_template)
        special = sorted({*names, "<|user|>", "<|assistant|>", "<|system|>"} - {"<think>"})
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        found = tokens.encodings(tokens.causal, tokenizer, row, DataConfig())
        texts = [tokens.marked(tokenizer, part["input_ids"], part["labels"]) for part in found]
        return [part.strip() for text in texts for part in re.findall("«(.*?)»", text, re.DOTALL)]

    return of


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_found_as_marks_say(learned, family, row):
    found = learned(family, ROWS[row])
    assert len(found) == 2
    assert "so long" in found[1]
    assert found == learned(f"{family}_training", ROWS[row])


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_calls_are_found_as_marks_say(learned, family):
    row = {"messages": CALLS, "tools": [TOOL]}
    found = learned(family, row)
    assert [part.count("<tool_call>") for part in found] == [1, 0]
    assert found == learned(f"{family}_training", row)
