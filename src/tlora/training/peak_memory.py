"""The peak memory of one run, which has a process to itself.

On a CUDA device: the maximum that torch allocated there. On a CPU: the maximum resident memory of
the process minus its value before the model was loaded. Linux provides the high-water mark (VmHWM),
which is reset at the start of each stage; on other systems the mark covers the whole process so
far, including reading the rows, so it is an upper bound.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from construction on; `stage` closes one stage and begins the next."""

    def __init__(self, device: Any) -> None:
        import psutil  # accelerate brings it

        self._cuda = device if getattr(device, "type", "cpu") == "cuda" else None
        self.stages: dict[str, int] = {}
        self._what = self._reset()
        self._base = 0 if self._cuda is not None else psutil.Process().memory_info().rss

    def stage(self, name: str) -> None:
        """Record the peak since the last call, in bytes."""
        self.stages[name] = self.so_far()
        self._reset()

    def so_far(self) -> int:
        """Return the peak since the last stage, in bytes."""
        return max(0, self._peak() - self._base)

    def to_dict(self) -> dict[str, Any]:
        """Return the peaks of the stages, the largest of them, and a description."""
        return {"bytes": max(self.stages.values()), "stages": self.stages, "what": self._what}

    def _reset(self) -> str:
        """Reset the mark if possible; describe what it covers."""
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)
            return "most memory that torch allocated on the GPU"
        try:
            _CLEAR.write_text("5", encoding="ascii")  # "reset the peak", see proc(5)
            ever = ""
        except OSError:
            ever = " so far, reading the rows included,"
        return (
            f"most resident memory of the run's process{ever} above that before loading the model"
        )

    def _peak(self) -> int:
        if self._cuda is not None:
            import torch

            return torch.cuda.max_memory_allocated(self._cuda)
        if _STATUS.is_file():
            lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
