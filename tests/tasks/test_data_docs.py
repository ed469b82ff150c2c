"""The table of docs/data.md: each line's row is trained on as the line says."""

import copy
import json
import re
from pathlib import Path

import pytest

from tlora.tasks import rendering, tokens
from tlora.tasks.base import INSTRUCTION_PROMPT
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl
from tlora.tasks.shapes import SHAPES

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
LINE = re.compile(
    r"^\| (?P<shape>[^|`]+) \| `(?P<row>\{.*\})` \| (?P<format>\w+) \| `(?P<text>.+)` \|$"
)
LINES = [match for line in DOC.splitlines() if (match := LINE.match(line))]


def unescaped(text):
    return text.replace("\\|", "|")


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer):
    """A base without a template, and a chat model with ChatML, by the format that they lead to."""
    chat = copy.deepcopy(tiny_tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.eos_token = "<|im_end|>"
    rendering.set_template(chat, "qwen")
    return {"chat": chat, "alpaca": tiny_tokenizer, "raw": chat}


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['shape']}-{line['format']}")
def test_a_line_of_the_table_holds(line, tokenizers, tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text(unescaped(line["row"]) + "\n")
    tokenizer = tokenizers[line["format"]]
    task = Jsonl(DataConfig())
    task.settle(tokenizer.chat_template is not None, None)
    with caplog.at_level("INFO"):
        raw, _ = task.load(str(file), None)
    assert f"reading 1 rows as {line['shape']}, " in caplog.text
    (row,) = task.rows(raw, "rows.jsonl")
    (encoded,) = tokens.encodings(tokens.causal, tokenizer, row, task.data)
    text = tokens.marked(tokenizer, encoded["input_ids"], encoded["labels"])
    preamble = INSTRUCTION_PROMPT.split("\n")[0]
    assert text.replace(preamble, "Below ...") == json.loads(f'"{unescaped(line["text"])}"')


def test_every_shape_is_in_the_table():
    assert {line["shape"] for line in LINES} >= {shape.name for shape in SHAPES}
    assert {line["format"] for line in LINES} == {"chat", "alpaca", "raw"}
