"""A queue of jobs, each in its own process, several at a time.

Separate processes make jobs independent: a crash affects one job, all memory is freed, and no
model, generator or setting carries over to the next run. On a CPU under Linux, a fork server avoids
importing torch and transformers for each job: it forks a process that has only imported them.
Elsewhere (macOS cannot fork such a process safely, and a forked process may be unable to use a GPU)
each job starts from scratch.

No job outlives the queue: the queue ends its jobs when it stops, and a job ends itself when the
queue's process has died for any reason.
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
from typing import Any, ClassVar

from tlora.credentials import redacted
from tlora.errors import system_fault

_LOOK = 1.0  # polling interval in seconds for interrupts without a signal, such as Ray's
_GRACE = 5.0  # seconds for a job to end before it is killed
_LINES_KEPT = 20
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """One call of the queue's function."""

    name: str
    payload: dict[str, Any]
    """The argument: plain JSON values."""
    log: Path
    """Log file for the job's output."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    exit_code: int
    """Exit code of the process, or minus the signal that ended it."""
    seconds: float
    last_lines: list[str] = field(default_factory=list)
    """The last log lines of a failed job."""

    @property
    def cause(self) -> str:
        """Return how the process ended, in a few words."""
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        name = signal.Signals(-self.exit_code).name
        memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}"


@dataclass(frozen=True)
class Workers:
    """Runs jobs in processes on this machine."""

    begins: ClassVar[str] = "starts"
    """What happens to a job that `work` gets."""
    function: str
    """Function that every job calls with its payload: "module:name"."""
    jobs: int = 1
    """Number of parallel processes."""
    threads: int = 1
    """Threads per process."""
    preload: Sequence[str] = ()
    """Modules that the fork server imports once for all jobs."""
    gpus: Sequence[str] = ()
    """Accelerators, assigned to the slots of the queue in turn; a job sees one, or none for ""."""

    def work(
        self, ready: Callable[[], Job | None], settled: Callable[[Job, Outcome], None]
    ) -> None:
        """Run jobs until none is ready or running.

        Args:
            ready: called whenever a slot is free; returns a new job, or None if none is ready. A
                finished job may make others ready.
            settled: called when a job ends.
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
        # The fork server reads these when it starts, before importing anything that depends on the
        # number of threads; later changes have no effect.
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
    """Return the number of processors available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that both clean up in the same way."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
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
    """Run the job in its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the queue ends its jobs itself
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        with Path(log).open("wb", buffering=0) as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    except OSError as error:
        sys.exit(str(system_fault(error) or error))
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
    # A progress bar rewrites its line; keep only its last state.
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-_LINES_KEPT:]
