"""Commands in forked processes: everything is imported once, and each command starts at once."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "ACCELERATE_USE_CPU": "true",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""What `accelerate launch` sets for a group whose processes each hold a part of the model."""
_LOOK = 0.01


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """The exit code; minus the signal that ended it; None: it hung, and was killed."""
    text: str
    """What it wrote to its standard streams."""
    seconds: float

    @property
    def traceback(self) -> bool:
        """Whether it showed a traceback."""
        return "Traceback (most recent call last)" in self.text


@dataclass(frozen=True)
class Launch:
    """How a command is started."""

    log: Path
    """Where its standard streams go."""
    limit: float
    """Seconds after which it counts as hanging."""
    processes: int = 1
    kill_after: float | None = None
    """Seconds after which all its processes are killed."""
    modules: Path | None = None
    """Where to name the modules that it has imported at its end."""


def import_modules(names: Iterable[str]) -> None:
    """Import what a command has imported, so that the next one need not."""
    for name in names:
        if name not in sys.modules and not name.startswith("torch.distributed.run"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def in_children(functions: Sequence[Callable[[], None]]) -> None:
    """Call functions, each in a forked process, and wait for all.

    Raises:
        RuntimeError: one failed.
    """
    processes = []
    for function in functions:
        process = os.fork()
        if process == 0:
            try:
                function()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        processes.append(process)
    statuses = [os.waitpid(process, 0)[1] for process in processes]
    if any(statuses):
        raise RuntimeError("a forked process failed")


def run(argv: Sequence[str], launch: Launch, prepare: Callable[[], None] | None = None) -> Ended:
    """Run a command of `tlora`; ``prepare`` is called in its (first) process before it."""
    return finish(start(argv, launch, prepare), launch)


def start(
    argv: Sequence[str], launch: Launch, prepare: Callable[[], None] | None = None
) -> list[int]:
    """Start a command of `tlora`; return its processes, the first of which leads their group."""
    with contextlib.suppress(FileNotFoundError):
        launch.log.unlink()
    port = str(_free_port()) if launch.processes > 1 else ""
    processes: list[int] = []
    for rank in range(launch.processes):
        process = os.fork()
        if process == 0:
            _be(argv, launch, prepare if rank == 0 else None, (rank, port, processes))
        processes.append(process)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(process, processes[0])
    return processes


def finish(processes: list[int], launch: Launch) -> Ended:
    """Wait until a command ends; as a launcher does, end all when one of its processes failed."""
    started = time.monotonic()
    codes: dict[int, int | None] = {}
    while len(codes) < len(processes):
        seconds = time.monotonic() - started
        if seconds > launch.limit:
            _kill(processes, codes)
            return Ended(None, _text(launch.log), seconds)
        if launch.kill_after is not None and seconds > launch.kill_after:
            _kill(processes, codes)
            break
        for process in set(processes) - codes.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and len(codes) < len(processes):
            _kill(processes, codes)
        time.sleep(_LOOK)
    _kill_group(processes[0])
    code = next((code for code in codes.values() if code), 0)
    return Ended(code, _text(launch.log), time.monotonic() - started)


def _be(
    argv: Sequence[str],
    launch: Launch,
    prepare: Callable[[], None] | None,
    place: tuple[int, str, list[int]],
) -> None:
    """Be a process of a command."""
    code = 1
    try:
        rank, port, others = place
        os.setpgid(0, others[0] if others else 0)
        log = os.open(launch.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if launch.processes > 1:
            size = str(launch.processes)
            os.environ |= FSDP | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
            os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
            os.environ["MASTER_PORT"] = port
        _fork_jobs()
        if prepare is not None:
            prepare()
        from tlora import cli

        code = cli.main([*argv])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            if launch.modules is not None:
                launch.modules.write_text("\n".join(sys.modules))
        os._exit(code)


def _fork_jobs() -> None:
    """Let the runs of a comparison be forked from here, with what is watched."""
    import multiprocessing

    from tlora.compare.queue import Workers

    Workers._context = lambda self: multiprocessing.get_context("fork")


def _kill(processes: list[int], codes: dict[int, int | None]) -> None:
    _kill_group(processes[0])
    for process in set(processes) - codes.keys():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _kill_group(leader: int) -> None:
    """End the jobs that a killed command has left; they would end themselves a moment later."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EPERM):
            raise


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])
