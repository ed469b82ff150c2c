"""Stand-ins for the run of a comparison: they cost nothing and end as the test wants them to."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tlora.files import write_state

FOREVER = 600


def score(method: str, rate: float, seed: int) -> float:
    """Best at the rate 0.01; lora above tlora; a little of the seed."""
    return 0.9 - abs(rate - 0.01) - (0.1 if method == "tlora" else 0.0) + seed * 1e-4


def run(payload: dict[str, Any]) -> None:
    """Write the record that a real run would; crash or wait where the folder says so.

    A file "crash", "wait" or "late" (to crash when all is written) beside the runs' folder holds
    the start of a name. Like a real run's, its own files are there for as long as it runs.
    """
    record = payload["record"]
    home = Path(payload["file"]).parents[1]
    with (home / "starts.txt").open("a") as file:
        file.write(f"{record['name']}\n")
    mine = Path(payload["work"]) / "log.jsonl"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.touch()
    if record["name"].startswith(_word(home / "crash")):
        sys.stderr.write("about to fail\n")
        raise RuntimeError("no luck with this one")
    if record["name"].startswith(_word(home / "wait")):
        (home / "waiting.pid").write_text(f"{os.getpid()}\n")
        deadline = time.monotonic() + FOREVER
        while record["name"].startswith(_word(home / "wait")) and time.monotonic() < deadline:
            time.sleep(0.02)
    mine.unlink()
    rows = "test" if record["phase"] == "final" else "validation"
    value = score(record["method"], record["learning_rate"], record["seed"])
    write_state(
        payload["file"], record | {"status": "finished", "scores": {rows: {"accuracy": value}}}
    )
    if record["name"].startswith(_word(home / "late")):
        os._exit(3)


def _word(file: Path) -> str:
    return file.read_text() if file.is_file() else "nothing starts like this"


def meet(payload: dict[str, Any]) -> None:
    """End only when the other job is running too."""
    own, other = Path(payload["own"]), Path(payload["other"])
    own.touch()
    deadline = time.monotonic() + 60
    while not other.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the other job never ran beside this one")
        time.sleep(0.01)


def end(payload: dict[str, Any]) -> None:
    """End as `payload["how"]` says."""
    sys.stdout.write("a line on standard output\n")
    sys.stdout.flush()
    if payload["how"] == "raise":
        raise ValueError("a sentence about the fault")
    if payload["how"] == "abort":
        os.abort()
    if payload["how"] == "exit":
        os._exit(3)


def tell(payload: dict[str, Any]) -> None:
    """Write what the process sees of its environment."""
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    seen = {name: os.environ.get(name) for name in names}
    ids = {"pid": os.getpid(), "parent": os.getppid()}
    Path(payload["file"]).write_text(json.dumps(seen | ids))


def refuse(payload: dict[str, Any]) -> None:
    raise ValueError(payload["message"])


def held(payload: dict[str, Any]) -> None:
    """Do the real run; on a node that is to be killed, wait for that."""
    if flag := os.environ.get("HELD_RUN"):
        Path(flag).write_text(f"{os.getpid()}\n")
        time.sleep(FOREVER)
    from tlora.compare import onerun

    onerun.run(payload)


def sleep(payload: dict[str, Any]) -> None:
    """Say that it runs; end only with its parent."""
    Path(payload["pid"]).write_text(f"{os.getpid()}\n")
    time.sleep(FOREVER)


def kill_parent(payload: dict[str, Any]) -> None:
    """Kill what started this process, each time that it starts."""
    with Path(payload["starts"]).open("a") as file:
        file.write("start\n")
    os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
    time.sleep(FOREVER)
