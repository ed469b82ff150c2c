"""The trusted process, which runs the tests on values requested from the candidate.

The candidate never has the tests or the verdict channel, so its process cannot forge a verdict: it
can only answer, right or wrong.
"""

from __future__ import annotations

import builtins
import os
import signal
import socket
import sys
import traceback
from typing import Any

from .wire import Ended, Peer, Raised, Stub

Verdict = dict[str, str]


def examine(
    tests: str, entry_points: list[str], connection: socket.socket, candidate: int
) -> Verdict:
    """Run ``tests`` with the program's names; return {"status", "detail"}.

    Ignores the program's redefinitions of built-in functions unless they are in ``entry_points``
    (the tests' own ``abs`` is Python's), and its objects with the name of a standard module.
    """
    try:
        code = compile(tests, "tests.py", "exec")
    except (SyntaxError, ValueError) as error:
        return {"status": "failed", "detail": f"the tests are not Python: {error}"[:500]}
    try:
        peer = Peer(connection, trusting=False)
        defined = peer.request("call", 0)
        namespace = {"__name__": "tests", "__builtins__": builtins}
        namespace |= {
            name: value
            for name, value in defined.items()
            if name in entry_points or _harmless(name, value)
        }
        exec(code, namespace)
    except Ended:
        return _of_the_end(os.waitpid(candidate, 0)[1])
    except BaseException as error:
        return _of(error, tests)
    return {"status": "passed", "detail": ""}


def _harmless(name: str, value: Any) -> bool:
    """Whether the tests may use ``name`` from the program, because it shadows nothing they need."""
    if name.startswith("__") or hasattr(builtins, name):
        return False
    return not (isinstance(value, Stub) and name in sys.stdlib_module_names)


def _of(error: BaseException, tests: str) -> Verdict:
    kind = error.kind if isinstance(error, Raised) else type(error).__name__
    status = "memory" if kind == "MemoryError" else "failed"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == "tests.py"
    ]
    source = tests.split("\n")
    where = source[(lines[-1] or 1) - 1].strip() if lines else "loading the program"
    message = str(error) if isinstance(error, Raised) else f"{kind}: {error}".rstrip(": ")
    return {"status": status, "detail": f"{message[:500]}, at: {where[:500]}"}


def _of_the_end(code: int) -> Verdict:
    """Return the verdict on a candidate that ended too early."""
    if not os.WIFSIGNALED(code):
        detail = f"the program ended with exit code {os.waitstatus_to_exitcode(code)}"
        return {"status": "failed", "detail": f"{detail} before its tests did"}
    number = os.WTERMSIG(code)
    if number == signal.SIGXCPU:
        return {"status": "timed out", "detail": "the limit on CPU time"}
    return {"status": "crashed", "detail": f"the program was ended by {_name(number)}"}


def _name(number: Any) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
