"""The page about cost shows what the committed measurements say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
COST = PROJECT / "benchmarks" / "cost"
PRINTED = {
    "energy": lambda module, result: module.table(result["rows"]),
    "products": lambda module, result: module.table(result["rows"]),
    "stages": lambda module, result: module.page(result),
}


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in COST.glob("*.json") if path.stem in PRINTED)
)
def test_the_page_holds_the_tables_of_what_is_committed(script, name):
    for other in ("definition", "measure", "subjects", "tables", "models", "init", "energy"):
        script("cost", other)
    result = json.loads((COST / f"{name}.json").read_text())
    printed = PRINTED[name](script("cost", name), result)
    assert printed in (PROJECT / "docs" / "cost.md").read_text()
