"""The table of docs/memory.md is what its command prints."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks/site/memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_line_of_the_table_is_the_dry_run_of_its_model(memory, quantization):
    assert memory.line("Llama-3.2-1B", quantization) in PAGE.splitlines()


def test_every_model_has_a_line_for_each_way_of_storing_it(memory):
    lines = [line.split(" | ")[:2] for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert lines == [
        [f"| {model}", kind] for model in memory.MODELS for kind in ("bfloat16", "nf4")
    ]
