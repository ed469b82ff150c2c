"""The wheel of this checkout, and an interpreter that sees it and what it requires alone."""

from __future__ import annotations

import os
import sys

import environment
import pytest


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return environment.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def bare(request, tmp_path_factory):
    """TLORA_BARE_PYTHON names the interpreter of a virtual environment to test instead."""
    if given := os.environ.get("TLORA_BARE_PYTHON"):
        return environment.Python([given])
    folder = environment.bare(request.getfixturevalue("wheel"), tmp_path_factory.mktemp("bare"))
    return environment.Python([sys.executable, "-S"], folder)
