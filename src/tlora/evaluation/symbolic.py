"""Equality of mathematical expressions by math-verify, in a process of its own.

math-verify stops an endless comparison by a signal of the main thread, so that it works neither in
a thread pool nor in compiled code that holds the interpreter. Here another process compares, and
is killed when its time is over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tlora.errors import ConfigError

_WORKER = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0
"""Importing sympy takes seconds on a busy machine."""


class MathVerify:
    """Compares expressions; safe to share between threads, which then take turns.

    The process starts with the first comparison and lives until `close`, or until the end of the
    ``with`` block.

    Args:
        seconds: the most wall-clock time of one comparison.
        memory: the most address space of the process, in bytes.

    Raises:
        ConfigError: math-verify is not installed.

    Source: math-verify, https://github.com/huggingface/Math-Verify.
    """

    def __init__(self, seconds: float = 10.0, memory: int = 4 << 30) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "math-verify is not installed; run pip install 'tlora[eval]'.", where="evaluation"
            )
        self.seconds = seconds
        self.memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, reference: str) -> bool | None:
        """Whether ``answer`` is mathematically ``reference``.

        None where that could not be found out: one of the two is no expression that math-verify
        reads, or the comparison took too long or too much memory.
        """
        request = json.dumps([answer, reference]).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            try:
                assert process.stdin is not None
                process.stdin.write(request)
                process.stdin.flush()
                return self._reply(process, self.seconds)
            except (OSError, TimeoutError):
                # Too slow, or gone: killed by the system, or crashed inside a library.
                self._stop()
                return None

    def close(self) -> None:
        """End the process; a later comparison starts a new one."""
        with self._lock:
            self._stop()

    def __enter__(self) -> MathVerify:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the modules beside the worker must not stand in for those of the standard library.
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._reply(process, _START_SECONDS)
        except (OSError, TimeoutError) as error:
            self._stop()
            raise ConfigError(
                "math-verify does not start; see what `python -c 'import math_verify'` says.",
                where="evaluation",
            ) from error
        return process

    def _stop(self) -> None:
        process, self._process = getattr(self, "_process", None), None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # What was still to be sent has nobody to read it.
                with contextlib.suppress(OSError):
                    pipe.close()

    @staticmethod
    def _reply(process: subprocess.Popen[bytes], seconds: float) -> Any:
        """Read one line; TimeoutError when it does not come, OSError when none will."""
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        handle, line = process.stdout.fileno(), b""
        ready = select.poll()
        ready.register(handle, select.POLLIN)
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not ready.poll(1000 * left):
                raise TimeoutError
            part = os.read(handle, 4096)
            if not part:
                raise OSError("the process has ended")
            line += part
        return json.loads(line)
