"""The first process of a sandbox: it isolates, forks, and watches from outside.

::

    caller ── launcher ──(new namespaces)── examiner, their init ── candidate ── whatever it starts

The launcher stays on the caller's side. When it is told to end, or dies, the examiner is killed;
as the init of the namespace it takes every process with it, whatever its group or parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

from . import calls, isolate, kernel
from .candidate import run
from .examiner import Verdict, examine

_PAGE = os.sysconf("SC_PAGE_SIZE")
_POLL_SECONDS = 0.05
_VERDICTS = 3
"""File descriptor for verdicts to the caller; in the candidate, for the wire."""


def main() -> NoReturn:
    """Read the order from stdin, execute it, write the verdict and clean up."""
    order = json.loads(_block())
    # Lower the limit, so that closing all descriptors later covers every one of the caller's.
    if (verdicts := order.pop("verdicts")) != _VERDICTS:
        os.dup2(verdicts, _VERDICTS)
        os.close(verdicts)
    strong = order["protection"] == "namespaces"
    try:
        if strong:
            isolate.enter_namespaces()
        else:
            kernel.adopt_orphans()
    except OSError as error:
        _verdict({"status": "unavailable", "detail": str(error)})
        os._exit(0)
    waited = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    number = os.getpid()
    examiner = os.fork()
    if examiner == 0:
        _inside(order, number)
    kernel.die_with_parent(signal.SIGTERM)
    if os.getppid() == order["caller"]:
        _watch(order, examiner, waited)
    _end(examiner, everything=not strong)
    os._exit(0)


def _watch(order: dict[str, Any], examiner: int, waited: set[signal.Signals]) -> None:
    """Wait until the examiner has ended or must end."""
    while True:
        told = signal.sigtimedwait(waited, _POLL_SECONDS)
        if told is not None and told.si_signo == signal.SIGTERM:
            return
        # WNOWAIT: until it is collected, its process id is not reused.
        if os.waitid(os.P_PID, examiner, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        if sum(map(_resident, _tree(examiner))) > order["limits"]["memory"]:
            _verdict({"status": "memory", "detail": "all processes together"})
            return


def _end(examiner: int, everything: bool) -> None:
    """Kill the examiner; without a namespace, all descendants of this process."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(examiner, signal.SIGKILL)
    os.waitpid(examiner, 0)
    while everything:
        found = _tree(os.getpid())[1:]
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        everything = bool(found)


def _tree(process: int) -> list[int]:
    """Return a process and its descendants visible in /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            # The name may contain anything; after it come the state and the parent.
            parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(folder.name))
    found = [process]
    for member in found:
        found += children.get(member, [])
    return found


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _inside(order: dict[str, Any], number: int) -> NoReturn:
    """Run the examiner: enter the file system, drop all rights, fork the candidate, test it."""
    status = "unavailable"
    try:
        _confine(order, number)
        status = "crashed"
        mine, theirs = socket.socketpair()
        candidate = os.fork()
        if candidate == 0:
            _become_candidate(order, theirs)
        theirs.close()
        _verdict({"status": "started"})
        # Read only now, so that the fork did not copy the tests to the candidate.
        tests = _block()
        _verdict(examine(tests, order["entry_points"], mine, candidate))
    except BaseException as error:
        _verdict({"status": status, "detail": f"the sandbox itself: {error!r}"})
    finally:
        os._exit(0)


def _confine(order: dict[str, Any], number: int) -> None:
    limits, processes = order["limits"], order["limits"]["processes"] + 1
    if order["protection"] == "namespaces":
        # The user of a user namespace also owns the launcher.
        processes += os.geteuid() != 0
        isolate.enter_file_system(limits["scratch"])
    elif os.geteuid() != 0:
        processes += isolate.threads_of_this_user()
    isolate.become_nobody(number)
    kernel.die_with_parent(signal.SIGKILL)
    if order["protection"] != "namespaces":
        devices = [f"/dev/{name}" for name in isolate.DEVICES]
        os.chdir(order["scratch"])
        kernel.landlock(isolate.readable(), [order["scratch"]], devices)
    kernel.allow_inspection(False)
    isolate.set_limits(limits, processes)
    calls.refuse()


def _become_candidate(order: dict[str, Any], connection: socket.socket) -> NoReturn:
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        kernel.allow_inspection(True)
        nothing = os.open("/dev/null", os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(connection.fileno(), _VERDICTS)
        connection.detach()
        os.closerange(4, 1024)
        program = order["program"]
        order.clear()
        run(program, socket.socket(fileno=_VERDICTS))
    finally:
        os._exit(1)


def _block() -> str:
    """Read a length-prefixed text."""
    (size,) = struct.unpack("<Q", _exactly(8))
    return _exactly(size).decode("utf-8", "surrogatepass")


def _exactly(size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(0, size - len(parts))
        if not part:
            sys.exit(1)
        parts += part
    return bytes(parts)


def _verdict(verdict: Verdict) -> None:
    with contextlib.suppress(OSError):
        os.write(_VERDICTS, json.dumps(verdict).encode() + b"\n")
