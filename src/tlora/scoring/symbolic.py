"""Equality of mathematical expressions by math-verify, in a separate process.

math-verify stops an endless comparison with a signal to the main thread, which fails in a thread
pool and in compiled code that holds the interpreter. Here its own limits are off, and a pool worker
compares, which the pool kills at the time limit.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any


class MathVerify:
    """Compares expressions; threads may share one.

    The worker starts with the first comparison and lives until `close`, or until the end of the
    ``with`` block. Like every process that Python spawns, it imports the main script, so a script
    has to start its work below ``if __name__ == "__main__"``.

    Args:
        seconds: wall-clock limit of one comparison.
        memory: limit of the worker's address space in bytes.

    Source: math-verify, https://github.com/huggingface/Math-Verify.
    """

    def __init__(self, seconds: float = 10.0, memory: int = 4 << 30) -> None:
        from pebble import ProcessPool

        self.seconds = seconds
        # Spawn, because a fork would copy the locks of torch's threads.
        self._pool = ProcessPool(
            1,
            initializer=_start,
            initargs=(memory,),
            context=multiprocessing.get_context("spawn"),
        )

    def equal(self, answer: str, reference: str) -> bool | None:
        """Whether ``answer`` and ``reference`` are mathematically equal.

        None if unknown: math-verify cannot parse one of the two, or the comparison took too long or
        too much memory.
        """
        from pebble import ProcessExpired

        try:
            task = self._pool.schedule(_equal, (answer, reference), timeout=self.seconds)
            return task.result()
        except (concurrent.futures.TimeoutError, ProcessExpired):  # 3.10: not the built-in one
            # Too slow, or the worker was killed by the system or crashed inside a library.
            return None

    def close(self) -> None:
        """End the worker."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> MathVerify:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start(memory: int) -> None:
    """Prepare this process for comparisons.

    Model output can ask for numbers of any size, hence the limit on memory.
    """
    import resource

    import math_verify  # noqa: F401 - keep its import time out of the first comparison

    logging.disable(logging.CRITICAL)
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    pages = Path("/proc/self/statm")
    used = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))


def _equal(answer: str, reference: str) -> bool | None:
    from math_verify import parse, verify

    try:
        # The box delimits the answer; nothing outside it counts.
        given, right = (
            parse(rf"\boxed{{{text}}}", parsing_timeout=None, extraction_mode="first_match")
            for text in (answer, reference)
        )
        if not (given and right):
            return None
        equal = verify(right, given, timeout_seconds=None)
        return equal and not _tiny_and_different(given[0], right[0])
    except Exception:
        # Out of memory, too deep, or an error in a library.
        return None


def _tiny_and_different(one: Any, other: Any) -> bool:
    """Whether two numbers agree to math-verify's six decimals only because both are tiny."""
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return False
    first, second = one.evalf(), other.evalf()
    size = max(abs(first), abs(second))
    return bool(0 < size < 1e-3 and abs(first - second) > 1e-6 * size)
