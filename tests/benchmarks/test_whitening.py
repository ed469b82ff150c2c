"""Whitening on the committed tables: the page's table, and how even features are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FINDINGS = Path(__file__).parents[2] / "docs/findings.md"


@pytest.fixture
def whitening(script):
    return script("quality", "whitening")


def test_the_page_has_the_table_that_the_command_prints(whitening):
    shares = whitening.read_json(whitening.KEPT)
    assert whitening.table(shares) in FINDINGS.read_text(encoding="utf-8")


@pytest.mark.parametrize(("sizes", "expected"), [((2, 2, 2), 3), ((5, 0, 0), 1), ((1, 1, 0), 2)])
def test_evenness_counts_the_features_of_one_size(whitening, sizes, expected):
    moments = {"layer": torch.diag(torch.tensor([*sizes, 7], dtype=torch.float64))}
    basis = {"layer": torch.eye(4, dtype=torch.float64)[:3]}
    assert whitening.evenness(basis, moments) == pytest.approx(expected)
