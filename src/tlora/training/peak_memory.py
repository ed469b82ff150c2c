"""The peak memory of one run, which has a process to itself.

On a CUDA device: the most that torch had allocated there. On a CPU: the most resident memory of
the process above what it had before the model was loaded. The high-water mark is Linux' own
(VmHWM), reset at the start of each stage; elsewhere it is that of the whole process so far, which
reading the rows may have set, so it is an upper bound.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from where it is made; `stage` closes one stage and begins the next."""

    def __init__(self, device: Any) -> None:
        self._cuda = device if getattr(device, "type", "cpu") == "cuda" else None
        self.stages: dict[str, int] = {}
        self._exact = self._reset()
        self._base = 0 if self._cuda is not None else _resident()

    def stage(self, name: str) -> None:
        """Note the peak since the last call, in bytes."""
        self.stages[name] = max(0, self._peak() - self._base)
        self._reset()

    def to_dict(self) -> dict[str, Any]:
        """Return the peaks of the stages, the largest of them, and what was measured."""
        if self._cuda is not None:
            what = "most memory that torch allocated on the GPU"
        elif self._exact:
            what = "most resident memory of the run's process above that before loading the model"
        else:
            what = (
                "most resident memory of the run's process so far, reading the rows included,"
                " above that before loading the model"
            )
        return {"bytes": max(self.stages.values()), "stages": self.stages, "what": what}

    def _reset(self) -> bool:
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)
            return True
        try:
            _CLEAR.write_text("5", encoding="ascii")  # "reset the peak", see proc(5)
        except OSError:
            return False
        return True

    def _peak(self) -> int:
        if self._cuda is not None:
            import torch

            return torch.cuda.max_memory_allocated(self._cuda)
        if self._exact:
            return _status("VmHWM")
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident() -> int:
    if _STATUS.is_file():
        return _status("VmRSS")
    import psutil  # accelerate brings it

    return psutil.Process(os.getpid()).memory_info().rss


def _status(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")
