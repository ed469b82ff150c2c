"""Run model-written programs, and check whether they pass their tests.

A program is untrusted: it may loop, fill the disk, delete files, call home, or claim to have
passed. It runs in its own process, and its tests in another, which asks it for values; see
`tlora.scoring.sandbox.inside`. ``docs/evaluation.md`` describes what this protects against and
what it does not. It needs Linux, but nothing besides Python and the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from tlora.errors import ConfigError, SandboxError

Status = Literal["passed", "failed", "timed out", "memory", "output limit", "crashed"]
Protection = Literal["namespaces", "landlock"]

PROTECTIONS = get_args(Protection)
"""The levels of protection, strongest first; docs/evaluation.md describes each."""

# Load by file location, not by search path: no other "inside" can replace it, and the program
# cannot find our modules.
_BOOT = """
import sys
sys.path.remove("")  # the working directory; Python 3.11 has -P for it
import importlib.util
spec = importlib.util.spec_from_file_location("inside", sys.argv.pop())
package = sys.modules["inside"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from inside.launch import main
main()
"""
_INSIDE = str(Path(__file__).with_name("inside") / "__init__.py")
_START_SECONDS = 300.0
"""Timeout for isolation, even on a busy machine; the program's time starts afterwards."""
_END_SECONDS = 60.0
_TAIL = 4000
"""Maximum characters of stderr to keep."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    seconds: float = 10.0
    """Wall-clock time of the program and its tests together."""
    cpu_seconds: int = 10
    """CPU time of each of its processes."""
    memory: int = 1 << 30
    """Bytes of address space of each process, and resident bytes of all together."""
    output: int = 1 << 20
    """Bytes written to stdout and stderr together."""
    file_size: int = 16 << 20
    """Bytes of one file in the scratch folder."""
    scratch: int = 64 << 20
    """Bytes of the scratch folder, which is in memory."""
    processes: int = 16
    """Processes and threads at one time."""

    def __post_init__(self) -> None:
        faults = [
            f"`{name}` is {value}; give a value above 0."
            for name, value in vars(self).items()
            if value <= 0
        ]
        if faults:
            raise ConfigError(faults, where="limits of the sandbox")


@dataclass(frozen=True)
class Result:
    """The result of a program; the same program gives the same record."""

    status: Status
    """"passed" if every test ran and held; else what ended it first."""
    detail: str = ""
    """Which test failed and how, or which limit was hit."""
    stderr: str = field(default="", compare=False)
    """The last characters of its stderr."""

    @property
    def passed(self) -> bool:
        """Whether every test ran and held."""
        return self.status == "passed"


class Sandbox:
    """Runs untrusted Python programs if the caller allows it; thread-safe.

    Args:
        allow_untrusted_code: must be True; the caller thereby decides to run model-written code on
            this machine.
        protection: a level of `PROTECTIONS`. A level that the machine does not support is an error,
            without fallback to a weaker one.
        limits: resource limits of one program.

    Raises:
        SandboxError: the caller does not allow it, or the machine does not support the protection.
    """

    def __init__(
        self,
        *,
        allow_untrusted_code: bool = False,
        protection: Protection = "namespaces",
        limits: Limits | None = None,
    ) -> None:
        if not allow_untrusted_code:
            raise SandboxError(
                "running model-written programs needs permission; read docs/evaluation.md, then"
                " pass allow_untrusted_code=True."
            )
        if protection not in PROTECTIONS:
            raise ConfigError(
                f"there is no protection {protection!r}; choose from {', '.join(PROTECTIONS)}.",
                where="sandbox",
            )
        self.protection = protection
        self.limits = limits or Limits()
        if not sys.platform.startswith("linux"):
            raise SandboxError(
                f"the sandbox needs Linux, but this is {sys.platform}; run this on Linux."
            )
        # Without a namespace the kernel counts all processes of the user as one program's: one at a
        # time, or one program's forks would fail another. Root gives each a user of its own.
        alone = protection != "namespaces" and os.geteuid() != 0
        self._turn = threading.Lock() if alone else contextlib.nullcontext()
        # A trial is more reliable than a list of kernel versions and settings.
        trial = self.run("def one(): return 1", "assert one() == 1")
        if not trial.passed:
            said = f"{trial.status}, {trial.detail}. {trial.stderr}".strip()
            raise SandboxError(f"the sandbox does not work on this machine: {said}")

    def run(self, program: str, tests: str, entry_points: Sequence[str] = ()) -> Result:
        """Run ``program``, then ``tests``, which see the names that the program defines.

        Args:
            program: the untrusted source.
            tests: trusted source. It gets the program's values as copies and the rest by
                reference, and fails by raising.
            entry_points: names that the tests take from the program even where Python has a
                built-in function of that name.

        Raises:
            SandboxError: the machine does not allow this protection.
        """
        with self._turn, self._scratch() as scratch, _pipe() as (verdicts, theirs):
            order = {
                "protection": self.protection,
                "limits": asdict(self.limits),
                "caller": os.getpid(),
                "scratch": scratch,
                "verdicts": theirs.fileno(),
                "entry_points": list(entry_points),
                "program": program,
            }
            process = subprocess.Popen(
                [sys.executable, "-s", "-c", _BOOT, _INSIDE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=_environment(scratch),
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            with _ended(process):
                _send(process, json.dumps(order), tests)
                return _Run(process, verdicts.fileno(), self.limits).result()

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[str]:
        """Yield the scratch folder; a namespace has its own."""
        if self.protection == "namespaces":
            yield "/tmp"
            return
        folder = tempfile.mkdtemp(prefix="tlora-sandbox-")
        try:
            Path(folder).chmod(0o777)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _environment(scratch: str) -> dict[str, str]:
    """Return the program's full environment, without anything from this process."""
    return {
        "HOME": scratch,
        "TMPDIR": scratch,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        # A library that starts a thread for every core would use up the processes allowed.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield the read and write ends of a pipe, closing both at the end."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", 0) as reading, os.fdopen(write, "wb", 0) as writing:
        yield reading, writing


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Always make the launcher clean up and end, then close the pipes."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _send(process: subprocess.Popen[bytes], *texts: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        for text in texts:
            block = text.encode("utf-8", "surrogatepass")
            process.stdin.write(struct.pack("<Q", len(block)) + block)
            process.stdin.flush()


class _Run:
    """Reads the output of a sandbox until there is a verdict or a limit is hit."""

    def __init__(self, process: subprocess.Popen[bytes], verdicts: int, limits: Limits) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._limits = limits
        self._output = 0
        self._verdicts = verdicts
        self._said = {verdicts: b"", process.stderr.fileno(): b"", process.stdout.fileno(): b""}
        self._stderr = process.stderr.fileno()
        self._selector = selectors.DefaultSelector()
        for handle in self._said:
            self._selector.register(handle, selectors.EVENT_READ)

    def result(self) -> Result:
        """Return the result of the program.

        Raises:
            SandboxError: the machine does not allow this protection.
        """
        with self._selector:
            if not self._read(_START_SECONDS, lines=1):
                raise SandboxError(
                    f"the sandbox did not start within {_START_SECONDS:g} s; the machine may be"
                    " overloaded."
                )
            first = self._lines()[:1]
            if first and first[0]["status"] == "unavailable":
                raise SandboxError(
                    f"this machine does not allow the sandbox ({first[0]['detail']}); see"
                    " docs/evaluation.md for its requirements and the weaker level."
                )
            in_time = self._read(self._limits.seconds, lines=2)
        tail = self._said[self._stderr].decode("utf-8", "replace")[-_TAIL:]
        if self._output > self._limits.output:
            return Result("output limit", f"more than {self._limits.output} bytes", tail)
        if not in_time:
            return Result("timed out", f"{self._limits.seconds:g} s of wall-clock time", tail)
        verdict = self._lines()[1:2]
        if not verdict:
            return Result("crashed", "the sandbox ended without a verdict", tail)
        return Result(verdict[0]["status"], verdict[0]["detail"], tail)

    def _read(self, seconds: float, lines: int) -> bool:
        """Read until ``lines`` verdicts have arrived or none can come; False on timeout."""
        deadline = time.monotonic() + seconds
        while len(self._lines()) < lines and self._verdicts in self._selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, _ in self._selector.select(left):
                part = os.read(key.fd, 1 << 16)
                if not part:
                    self._selector.unregister(key.fd)
                self._said[key.fd] += part
                if key.fd != self._verdicts:
                    self._output += len(part)
                    self._said[key.fd] = self._said[key.fd][-4 * _TAIL :]
            if self._output > self._limits.output:
                return True
        return True

    def _lines(self) -> list[dict[str, Any]]:
        whole = self._said[self._verdicts].rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]
