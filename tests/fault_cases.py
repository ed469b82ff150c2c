"""What tests/test_faults.py has a forked process do: it must have no thread, as pytest may."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
COUNT = 60


def in_ci(case: dict[str, Any]) -> bool:
    """Choose a few cases of the commands that are done in a moment."""
    quick = case["kind"] != "two processes" and case["command"] in ("export", "merge")
    return quick or case["id"].endswith("bit | chat with an export | seed 0 | 1 of 1")


def work(folder: str) -> None:
    """Do the cases, then some of them with writers that are not atomic, then one that hangs."""
    sys.path.insert(0, SCRIPTS)
    import faults
    from faultlib import kinds
    from faultlib.commands import World

    world = World(Path(folder))
    cases = [case for case in faults.plan(kinds.KINDS, COUNT, seed=0) if in_ci(case)]
    done = [case | asdict(faults.judged(world, case)) for case in cases]
    with _unsafe():
        killed = [case for case in cases if case["kind"] == "killed at a file event"]
        unsafe = [case | asdict(faults.judged(world, case)) for case in killed]
    hung = _hung(world)
    (Path(folder) / "done.json").write_text(json.dumps([done, unsafe, hung]))


@contextlib.contextmanager
def _unsafe() -> Iterator[None]:
    """Let exports write into the folder itself."""
    from tlora.exporters import export

    @contextlib.contextmanager
    def writing(folder: Path) -> Iterator[Path]:
        folder.mkdir()
        yield folder

    with _patched(export, "replacing_folder", writing):
        yield


def _hung(world: Any) -> dict[str, Any]:
    from faultlib import children, kinds
    from tlora import cli

    command = world.commands["export"]
    launch = replace(world.launch(command), limit=0.2)
    with _patched(cli, "main", lambda argv: time.sleep(3600)):
        ended = children.run(["export"], launch)
    case = kinds.Case(world, command, 0.0, None)
    return asdict(kinds.again(case, ended))


@contextlib.contextmanager
def _patched(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
