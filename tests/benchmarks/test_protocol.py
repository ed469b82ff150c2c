"""The paper's protocol at a small scale: the page's table, and the comparison of orders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

FINDINGS = Path(__file__).parents[2] / "docs/findings.md"


@pytest.fixture
def protocol(script):
    return script("quality", "protocol")


def test_the_page_has_the_table_that_the_command_prints(protocol):
    results = protocol.read(protocol.FOLDER)
    table = protocol.table(results).partition("\n\n")[0]
    page = FINDINGS.read_text(encoding="utf-8").replace("\n  ", " ")
    assert table in page
    low, best = (protocol.correlation(results, tuned) for tuned in (False, True))
    assert f"rank correlation {low:.2f} over" in page
    assert f"{best:.2f} at the best rates" in page


def test_the_order_is_compared_at_the_low_rate_or_at_each_best(protocol):
    def method(label, low, best):
        means = {protocol.LOW_RATE: low, 0.01: best}
        return SimpleNamespace(label=label, tuning_means=means, learning_rate=0.01)

    # The paper: init + SA before init before SA.
    results = SimpleNamespace(
        methods=[
            method("init + SA", 0.1, 0.3),
            method("init", 0.2, 0.2),
            method("SA", 0.4, 0.1),
            method("none", 0.0, 0.0),  # the paper has no such row
        ]
    )
    assert protocol.correlation(results, tuned=False) == pytest.approx(1)
    assert protocol.correlation(results, tuned=True) == pytest.approx(-1)
