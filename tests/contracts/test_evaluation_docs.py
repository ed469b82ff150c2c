"""docs/evaluation.md is about the registered evaluations, and says of them what they do."""

import re
from pathlib import Path

import pytest

from tlora.evaluation.harness.base import Group
from tlora.registry import EVALUATIONS

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def rows():
    text = PAGE.read_text(encoding="utf-8").partition("\n## Tasks\n")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_table_has_every_evaluation():
    assert sorted(rows()) == sorted(EVALUATIONS.names())


@pytest.mark.parametrize("name", EVALUATIONS.names())
def test_the_table_says_what_the_evaluations_declare(name):
    made = EVALUATIONS.load(name)
    place, read, tokens = rows()[name]
    if isinstance(made, Group):
        return
    assert int(tokens) == made.max_gen_toks
    if path := re.match(r"`([^`]+)`", place):
        assert path[1] == made.source.files[0]
    if rule := re.match(r"`([^`]+)`", read):
        assert rule[1] == made.reads
