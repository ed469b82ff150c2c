from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: Any) -> Iterator[Processes]:
    """Two processes on gloo, started once."""
    group = Processes(tmp_path_factory.mktemp("processes"))
    yield group
    group.stop()
