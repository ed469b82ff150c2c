"""A process group of two processes on this machine, kept for the session; jobs are sent to it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

SIZE = 2
SECONDS = 180  # that a job may take on a loaded machine before it counts as hanging


class Processes:
    """Runs functions of modules in every process at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what ``job(*args)`` returns in each process; a failure of any fails the test."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((job, args))
        outcomes = [self._received(pipe, job.__name__) for pipe in self.pipes]
        failed = [f"process {i}:\n{text}" for i, (good, text) in enumerate(outcomes) if not good]
        if failed:
            self.stop()
        assert not failed, "\n".join(failed)
        return [value for _, value in outcomes]

    def _received(self, pipe: Any, job: str) -> tuple[bool, Any]:
        if not pipe.poll(SECONDS):
            self.stop()
            raise AssertionError(f"{job}: a process hangs")
        return pipe.recv()

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # which ends a process that waits for a job
        for process in self.processes:
            process.join(timeout=5)
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        self.started += 1
        context = multiprocessing.get_context("spawn")
        store = self.folder / f"store-{self.started}"
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, str(store), there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)


def serve(rank: int, store: str, pipe: Any) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=SECONDS),
    )
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            os._exit(0)  # without waiting for gloo to take its leave
        try:
            pipe.send((True, job(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
