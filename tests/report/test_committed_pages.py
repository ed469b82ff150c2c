"""The pages that are committed beside their runs open in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
PAGES = sorted(QUALITY.glob("*/compare.json"))

pytestmark = pytest.mark.browser


@pytest.fixture(params=PAGES, ids=lambda path: path.parent.name)
def file(request):
    return request.param.with_name("report.html")


def test_a_committed_page_opens_and_compares_its_first_two_methods(opened, file):
    tab = opened()
    table = file.with_suffix(".md").read_text(encoding="utf-8").split("\n\n")[1].splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table if line.startswith("| ")][1:]
    shown = tab.locator("#scores tbody th").all_inner_texts()
    assert all(name.startswith(row) for name, row in zip(shown, rows, strict=True))
    assert " minus " in (said := tab.locator("#verdict").inner_text()) or " is better than " in said
    assert tab.locator("#pairs tbody tr").count() > 0
