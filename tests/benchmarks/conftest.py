"""The scripts of `benchmarks/`, which are no package, as modules."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script by its folder and name, for one test."""
    names = []

    def load(folder, name):
        monkeypatch.syspath_prepend(str(BENCHMARKS / folder))
        names.append(name)
        return __import__(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)
