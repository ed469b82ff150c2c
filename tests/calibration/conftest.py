"""Model families, each with samples as they stand alone and the way they are batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support import FAMILIES, Family, make_family


@pytest.fixture(params=list(FAMILIES))
def family(request: Any) -> Family:
    """Every family in turn."""
    return make_family(request.param, request.getfixturevalue)


@pytest.fixture
def family_of(request: Any) -> Callable[[str], Family]:
    """The family of a name."""
    return lambda name: make_family(name, request.getfixturevalue)
