"""A fixed part of scripts/faults.py: no work is lost, and the script sees it where some is."""

from __future__ import annotations

import json
import multiprocessing
from typing import Any

import pytest

import fault_cases


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return outcomes: of tlora, of writers that are not atomic, of a command that hangs."""
    folder = tmp_path_factory.mktemp("faults")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=fault_cases.work, args=(str(folder),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads((folder / "done.json").read_text())


def test_no_fault_loses_anything_or_leaves_a_command_stuck(judged: Any) -> None:
    done, _, _ = judged
    assert len({case["kind"] for case in done}) >= 6
    assert [case for case in done if case["outcome"] in ("lost", "stuck")] == []
    assert [case["command"] for case in done if case["outcome"] == "refused"] != []


def test_a_writer_that_is_not_atomic_counts_as_lost(judged: Any) -> None:
    _, unsafe, _ = judged
    assert sum(case["outcome"] == "lost" for case in unsafe) > len(unsafe) / 2


def test_a_command_that_hangs_counts_as_stuck(judged: Any) -> None:
    assert judged[2]["outcome"] == "stuck"
