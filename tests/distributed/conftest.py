from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import runs
from processes import Processes

from tlora.training import train
from tlora.training.runfolder import RunFolder


@pytest.fixture(scope="session")
def processes(tmp_path_factory: Any) -> Iterator[Processes]:
    """Two processes on gloo, started once."""
    group = Processes(tmp_path_factory.mktemp("processes"))
    yield group
    group.stop()


@pytest.fixture(scope="session")
def rows(tmp_path_factory: Any) -> str:
    lines = [{"prompt": f"{n}+{n}=", "response": str(n + n)} for n in range(10, 34)]
    file = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="session")
def alone(rows: str, tmp_path_factory: Any) -> RunFolder:
    """A run of one process."""
    folder = str(tmp_path_factory.mktemp("alone") / "run")
    return train.run(runs.config(runs.BASE, rows, folder, batch_size=4))
