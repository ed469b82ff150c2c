"""A queue of jobs, each in a process of its own, several at a time.

A process for each job is what makes jobs independent: a crash takes one job with it, memory is
given back whole, and no model, generator or setting of one run reaches the next. On a CPU
under Linux, a fork server saves the cost of importing torch and transformers for each: a process
that has imported them and nothing else is forked for every job. Elsewhere (macOS cannot fork such a
process safely, and a forked process may be unable to use a GPU) each job starts from nothing.

No job outlives the queue: it is ended when the queue stops, and ends itself when the process that
holds the queue has died, however it died.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tlora.credentials import redacted

_LOOK = 1.0  # seconds between chances for an interrupt that is no signal, such as Ray's
_GRACE = 5.0  # seconds that a job gets to end before it is killed
_LINES_KEPT = 20
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """One call of the queue's function."""

    name: str
    payload: dict[str, Any]
    """The argument: plain JSON values."""
    log: Path
    """Where what the job writes to its standard streams goes."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    exit_code: int
    """0; what the process ended with; or minus the signal that ended it."""
    seconds: float
    last_lines: list[str] = field(default_factory=list)
    """The end of the log of a job that failed."""

    @property
    def cause(self) -> str:
        """Say how the process ended, in a few words."""
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        name = signal.Signals(-self.exit_code).name
        memory = "; often the system ran out of memory" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}"


@dataclass(frozen=True)
class Workers:
    """How jobs are run."""

    function: str
    """What every job calls with its payload: "module:name"."""
    jobs: int = 1
    """Processes at a time."""
    threads: int = 1
    """Threads of each."""
    preload: Sequence[str] = ()
    """Modules that the fork server imports once for all jobs."""
    gpus: Sequence[str] = ()
    """Accelerators, dealt out to the places of the queue in turn; a job sees one, of "" none."""

    def work(
        self, ready: Callable[[], Job | None], settled: Callable[[Job, Outcome], None]
    ) -> None:
        """Run jobs until none is ready and none is running.

        Args:
            ready: called whenever a place is free; returns a job that has not been given before,
                or None while there is none. A job that ends may make others ready.
            settled: called as each job ends.
        """
        context = self._context()
        running: dict[int, _Running] = {}
        try:
            while True:
                while len(running) < self.jobs and (job := ready()) is not None:
                    place = min(set(range(self.jobs)) - running.keys())
                    running[place] = self._start(context, job, place)
                if not running:
                    return
                wait([each.process.sentinel for each in running.values()], timeout=_LOOK)
                for place in [p for p, each in running.items() if not each.process.is_alive()]:
                    ended = running.pop(place)
                    settled(ended.job, ended.outcome())
        finally:
            _stop([each.process for each in running.values()])

    def _context(self) -> Any:
        if sys.platform != "linux" or any(self.gpus):
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        if self.preload:
            context.set_forkserver_preload(list(self.preload))
        return context

    def _environment(self, place: int) -> dict[str, str]:
        environment = {name: str(self.threads) for name in _THREAD_VARIABLES}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        return environment

    def _start(self, context: Any, job: Job, place: int) -> _Running:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = self._environment(place)
        process = context.Process(
            target=_run, args=(self.function, job.payload, str(job.log), environment)
        )
        # The fork server takes these over as it starts, before it imports anything that counts
        # threads; later they change nothing.
        with _environment(environment):
            process.start()
        return _Running(job, process, time.monotonic())


@dataclass(frozen=True)
class _Running:
    job: Job
    process: BaseProcess
    started: float

    def outcome(self) -> Outcome:
        self.process.join()
        code = self.process.exitcode or 0
        lines = _last_lines(self.job.log) if code else []
        return Outcome(code, time.monotonic() - self.started, lines)


def cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that both ways of stopping clean up alike."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours to handle there
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(function: str, payload: dict[str, Any], log: str, environment: dict[str, str]) -> None:
    """Be the job's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the queue decides, and ends its jobs
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with Path(log).open("wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    faulthandler.enable(file=2)
    os.environ.update(environment)
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(payload)
    except Exception:
        sys.exit(redacted(traceback.format_exc()))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _last_lines(log: Path) -> list[str]:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # A progress bar rewrites its line; the last state of it is enough.
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-_LINES_KEPT:]
