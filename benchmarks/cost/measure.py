"""Time and peak memory of one initialization, in a process of its own.

The process is forked from one that has imported everything and computed nothing. It builds the
model, warms the code up on a small model, gives unused memory back to the system, and only then
starts the clock. Peak memory is what the process grows above that: on a CPU VmHWM, which Linux
lets a process set back, minus VmRSS; on a GPU torch's own maximum.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}: peak memory is measured on Linux alone.")
    return int(found[1]) * 1024


def measured(
    prepare: Callable[[], tuple[Any, Any]], run: Callable[..., Any], device: str
) -> dict[str, Any]:
    """Run ``run(*prepare())`` with the clock around ``run``; return seconds and bytes.

    Args:
        prepare: builds the model and the batches.
        run: the initialization; what it returns is kept alive until the peak is read.
        device: "cpu" or "cuda".
    """
    model, batches = prepare()
    gc.collect()
    if device == "cuda":
        return _on_gpu(model, batches, run)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start, spent = time.perf_counter(), time.process_time()
    kept = run(model, batches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - spent
    peak = resident("VmHWM") - before
    del kept
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


def _on_gpu(model: Any, batches: Any, run: Callable[..., Any]) -> dict[str, Any]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, spent = time.perf_counter(), time.process_time()
    kept = run(model, batches)
    torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - spent
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


def synchronized(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_child(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """Return what ``work`` gives in a forked process, or {"failed": why}.

    Args:
        work: called in the child.
        limit: seconds after which it is stopped.
    """
    context = multiprocessing.get_context("fork")
    near, far = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(far, work))
    child.start()
    far.close()
    try:
        if not near.poll(limit):
            return {"failed": f"not done after {limit:g} s"}
        return near.recv()
    except EOFError:
        return {"failed": "the process died (out of memory?)"}
    finally:
        child.terminate()
        child.join()


def _answer(far: Any, work: Callable[[], dict[str, Any]]) -> None:
    try:
        far.send(work())
    except Exception as error:  # whatever the initialization raises is its result
        traceback.print_exc()
        far.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
