"""Saved adapters on tiny models."""

from __future__ import annotations

import pytest

from served import SERVED, Saved, save


@pytest.fixture(scope="session", params=[*SERVED])
def served(request, tmp_path_factory) -> Saved:
    """An adapter on each of the twelve families."""
    return save(SERVED[request.param], tmp_path_factory.mktemp(f"served-{request.param}"))


@pytest.fixture(scope="session")
def varied(tmp_path_factory) -> Saved:
    """An adapter on a Llama."""
    return save(SERVED["llama"], tmp_path_factory.mktemp("varied"))
