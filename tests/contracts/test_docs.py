"""docs/methods.md is about the registered methods, and says of them what they say themselves."""

import re
from pathlib import Path

from tlora.registry import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def rows():
    lines = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_table_has_every_method_in_the_order_of_the_registry():
    assert list(rows()) == METHODS.names()


def test_the_table_says_what_the_methods_declare():
    reads = {"nothing": "no", "inputs": "inputs", "gradients": "inputs, gradients"}
    starts = {"identical": "W x", "rounding": "rounding"}
    sources = {"PEFT": "PEFT", "tlora": "ours"}
    for name, (layer, _, numbers, read, start, paper, source) in rows().items():
        traits = METHODS.load(name).traits
        assert numbers == traits.parameters.partition(",")[0], name
        assert read == reads[traits.reads], name
        assert start == starts[traits.start], name
        assert source == sources[traits.source], name
        assert layer.startswith("W' x") == (traits.changes_base and traits.leaves == "adapter"), (
            name
        )
        if traits.leaves == "adapter":
            assert f"arxiv.org/abs/{traits.arxiv}" in paper, name
