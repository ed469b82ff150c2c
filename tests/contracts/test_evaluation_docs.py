"""docs/evaluation.md is about the registered evaluations, and says of them what they do."""

import re
from pathlib import Path

from lm_eval.tasks import TaskManager

from tlora.registry import EVALUATIONS

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def rows():
    text = PAGE.read_text(encoding="utf-8").partition("\n## Tasks\n")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_table_has_every_evaluation():
    assert sorted(rows()) == sorted(EVALUATIONS.names())


def test_the_table_says_what_the_evaluations_declare():
    folder = str(Path(EVALUATIONS.load("gsm8k-paper")).parent)
    index = TaskManager(include_path=folder, include_defaults=False).task_index
    compared = 0
    for name, (place, read, tokens) in rows().items():
        config = index[name].cfg
        if "group" in config:
            continue
        assert int(tokens) == config["generation_kwargs"]["max_gen_toks"]
        if path := re.match(r"`([^`]+)`", place):
            assert path[1] == config["dataset_kwargs"]["files"][0]
        if rule := re.match(r"`([^`]+)`", read):
            assert rule[1] == config["filter_list"][0]["name"]
            compared += 1
    assert compared > 15
