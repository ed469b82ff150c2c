"""The file events of a process below a folder: they are counted, and a fault comes at one of them.

Python reports what it opens, renames and removes to audit hooks. safetensors and torch write files
in Rust and C++, so their functions are wrapped. A hook cannot be taken back: call `watch` in a
process that is forked for one case.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}
"""How many paths the events have that change a folder."""
SAVES, SAVED = "saves", "saved"
"""Before and after a file is written outside Python."""

Act = Callable[[int, str, "list[str]"], None]
"""Called with the number of an event (from 1), its kind and its paths, before it happens."""


class Counter:
    """A number that forked processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def next(self) -> int:
        """Count one more."""
        value = self.value + 1
        self._memory[:8] = value.to_bytes(8, "little")
        return value

    @property
    def value(self) -> int:
        """The events so far."""
        return int.from_bytes(self._memory[:8], "little")


def watch(folder: Path, counter: Counter, act: Act | None = None) -> None:
    """Count the events below ``folder``, here and in forked processes, and let ``act`` see them."""
    root = f"{folder}/"
    inside = False

    def report(kind: str, *paths: str) -> None:
        nonlocal inside
        if inside or not any(f"{path}/".startswith(root) for path in paths):
            return
        inside = True
        try:
            number = counter.next()
            if act is not None:
                act(number, kind, [*paths])
        finally:
            inside = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & _WRITES:
                report("open", os.path.abspath(os.fsdecode(path)))  # noqa: PTH100
        elif event in _PATHS:
            count = _PATHS[event]
            folders = arguments[-count:] if event != "os.truncate" else (-1,)
            report(event, *map(_absolute, arguments[:count], folders))

    sys.addaudithook(hook)
    _wrap_foreign_writers(report)


def _absolute(path: Any, folder: int) -> str:
    base = os.readlink(f"/proc/self/fd/{folder}") if folder not in (-1, None) else ""  # noqa: PTH115
    return os.path.abspath(os.path.join(base, os.fsdecode(path)))  # noqa: PTH100, PTH118


def _wrap_foreign_writers(report: Callable[..., None]) -> None:
    import safetensors.torch
    import torch

    def wrap(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(content: Any, file: Any, *rest: Any, **named: Any) -> Any:
            named_file = isinstance(file, str | os.PathLike)
            path = str(Path(file).absolute()) if named_file else ""
            report(SAVES, path)
            result = write(content, file, *rest, **named)
            report(SAVED, path)
            return result

        return wrapped

    safetensors.torch.serialize_file = wrap(safetensors.torch.serialize_file)
    torch.save = wrap(torch.save)


def kill_at(number: int, how: str) -> Act:
    """Return what kills the process, or all of the command's, at an event.

    Args:
        number: of the event.
        how: "before" it, "after" it, or "cut": after it, with half of the file written. With
            "group " in front, all processes of the command.
    """

    def act(seen: int, kind: str, paths: list[str]) -> None:
        if seen != number:
            return
        if not how.endswith("before"):
            _do(kind, paths)
        if how.endswith("cut") and kind == SAVED:
            with contextlib.suppress(OSError):
                os.truncate(paths[0], Path(paths[0]).stat().st_size // 2)
        if how.startswith("group"):
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def _do(kind: str, paths: list[str]) -> None:
    """Do what an event announces, as far as it changes the folder."""
    with contextlib.suppress(OSError):
        if kind == "open":
            os.close(os.open(paths[0], os.O_CREAT | os.O_WRONLY, 0o644))
        elif kind == "os.rename":
            os.replace(*paths)  # noqa: PTH105
        elif kind in ("os.remove", "os.mkdir", "os.rmdir"):
            getattr(os, kind.removeprefix("os."))(paths[0])


def refuse_from(number: int, code: int) -> Act:
    """Return what makes the system refuse every write from an event on: a full disk, or EROFS."""

    def act(seen: int, kind: str, paths: list[str]) -> None:
        needs_space = kind in ("open", SAVES, "os.mkdir")
        if seen < number or kind == SAVED or (code == errno.ENOSPC and not needs_space):
            return
        if kind == SAVES:
            raise RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code), paths[0])

    return act


def call_at(number: int, function: Callable[[], None]) -> Act:
    """Return what calls a function at an event."""

    def act(seen: int, kind: str, paths: list[str]) -> None:
        if seen == number:
            function()

    return act


def set_back(seconds: float) -> None:
    """Set the clock of this process and its children back; files do not change."""
    import time

    real, real_ns = time.time, time.time_ns
    shown, local = time.gmtime, time.localtime
    time.time = lambda: real() - seconds
    time.time_ns = lambda: real_ns() - int(seconds * 1e9)
    time.gmtime = lambda at=None: shown(time.time() if at is None else at)
    time.localtime = lambda at=None: local(time.time() if at is None else at)


def age(folder: Path, seconds: float) -> None:
    """Move the times of all files into the future, as a clock leaves them that is set back."""
    for path in _below(folder):
        status = path.stat()
        os.utime(path, (status.st_atime + seconds, status.st_mtime + seconds))


def _below(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if not path.is_symlink())
