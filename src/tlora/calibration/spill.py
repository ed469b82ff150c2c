"""Second moments and gradients beyond the memory budget: in files that are mapped to memory."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tlora.config import TLoraConfig, bytes_text
from tlora.errors import CalibrationError

# What a file system says that cannot set room aside.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def spill_budget(config: TLoraConfig) -> int | None:
    """Return the bytes of second moments to keep in memory where all are kept; None: no limit."""
    return 0 if config.covariance == "streamed" else config.memory_budget_bytes


class Spill:
    """Gives out accumulators: in memory while the budget lasts, then in mapped files.

    The system writes a mapped file out and drops it from memory as it sees fit. It has no name any
    more once it is mapped (where the system allows that, else until the process ends), so it goes
    when its tensor or the process does, however that ends.

    Args:
        budget: bytes that accumulators in memory may take together.
        folder: where the files are; on a disk, not in memory (tmpfs).

    Attributes:
        room: what is left of the budget.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self.room = budget
        self.folder = folder

    def zeros(
        self, columns: int, device: torch.device, rows: int | None = None
    ) -> tuple[Tensor, bool]:
        """Return float32 zeros, and whether they are in memory (then on ``device``).

        Args:
            columns: of the matrix.
            device: of what is in memory.
            rows: of the matrix; None: as many as columns.

        Raises:
            CalibrationError: the folder cannot take the file.
        """
        rows = columns if rows is None else rows
        size = 4 * rows * columns
        if size <= self.room:
            self.room -= size
            return torch.zeros(rows, columns, device=device), True
        try:
            return _mapped((rows, columns), size, self.folder), False
        except OSError as error:
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            raise CalibrationError(
                f"{_named(rows, columns)} of {bytes_text(size)} beyond `memory_budget` cannot be"
                f" put in {self.folder} ({error.strerror}; {bytes_text(free)} free); raise"
                " `memory_budget`, or set TMPDIR to a folder on a disk with room."
            ) from error


def _named(rows: int, columns: int) -> str:
    return "a second moment" if rows == columns else "a gradient"


def _mapped(shape: tuple[int, int], size: int, folder: Path) -> Tensor:
    handle, name = tempfile.mkstemp(prefix=".tlora-", suffix=".moment", dir=folder)
    try:
        _reserve(handle, size)
        entries = torch.from_file(name, shared=True, size=size // 4, dtype=torch.float32)
        return entries.view(shape)
    finally:
        os.close(handle)
        _remove(Path(name))


def _reserve(handle: int, size: int) -> None:
    """Make the file that long, of zeros. Set aside now, a full disk is an error and no crash."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(handle, size)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        # Windows keeps what is mapped; by the end of the process it is let go.
        atexit.register(_remove_late, path)


def _remove_late(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # It lies in the folder for temporary files, or beside the cache, under a telling name.
        return
