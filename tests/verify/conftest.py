"""Saved adapters on tiny models."""

from __future__ import annotations

import pytest

from served import SERVED, Saved, save


@pytest.fixture(scope="session")
def varied(tmp_path_factory) -> Saved:
    """An adapter on a Llama."""
    return save(SERVED["llama"], tmp_path_factory.mktemp("varied"))
