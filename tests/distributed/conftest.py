from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: Any) -> Iterator[Ranks]:
    """Two ranks on gloo, started once."""
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()
