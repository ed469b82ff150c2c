"""Linux system calls without a function in Python 3.11.

Sources: the manual pages unshare(2), mount(2), pivot_root(2), mount_setattr(2), prctl(2),
capset(2), landlock(7).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NEW_MOUNTS, NEW_HOSTNAME, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000

NO_SUID, NO_DEVICES, NO_EXECUTION = 2, 4, 8
BIND, DETACH, RECURSIVE, SLAVE = 4096, 2, 16384, 1 << 19

_ATTRIBUTES_READ_ONLY = 1 | 2 | 4  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_MOUNT_SETATTR = 442  # the same number on every architecture but alpha
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(number: int, what: str, *arguments: Any) -> int:
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), what)


def unshare(flags: int) -> None:
    """Give this process (for NEW_PROCESSES: its children) new namespaces."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(
    source: str | None, target: str, kind: str | None, flags: int = 0, options: str = ""
) -> None:
    """mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    data = options.encode() or None
    _checked(_libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {kind or source}")


def detach(target: str) -> None:
    """Unmount a tree once it is unused."""
    _checked(_libc.umount2(os.fsencode(target), DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Make ``new`` the root and put the former root at ``old``."""
    _checked(_libc.pivot_root(os.fsencode(new), os.fsencode(old)), "pivot_root")


def read_only(path: str, tree: bool = True) -> None:
    """Make a mount, or it and all mounts below, read-only, without set-uid and devices."""
    attributes = struct.pack("QQQQ", _ATTRIBUTES_READ_ONLY, 0, 0, 0)
    _call(
        _MOUNT_SETATTR,
        f"mount_setattr {path} (needs Linux 5.12)",
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(path),
        ctypes.c_uint(_AT_RECURSIVE if tree else 0),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


def control(option: int, what: str, *arguments: Any) -> None:
    """Call prctl(2); error messages use the name ``what``."""
    zeros = [ctypes.c_ulong(0)] * (4 - len(arguments))
    _checked(_libc.prctl(ctypes.c_int(option), *arguments, *zeros), what)


def _prctl(option: int, value: int) -> None:
    control(option, f"prctl {option}", ctypes.c_ulong(value))


def die_with_parent(signal: int) -> None:
    """Get ``signal`` when the parent dies; changing user or namespace resets this."""
    _prctl(1, signal)


def allow_inspection(allowed: bool) -> None:
    """Set whether processes of the same user may trace this one and read its memory."""
    _prctl(4, int(allowed))


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants (PR_SET_CHILD_SUBREAPER)."""
    _prctl(36, 1)


def no_new_privileges() -> None:
    """Never gain rights by starting a program (set-uid, file capabilities)."""
    _prctl(38, 1)


def drop_capabilities() -> None:
    """Drop every capability of this thread."""
    header = struct.pack("Ii", 0x20080522, 0)
    _checked(_libc.capset(header, struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)), "capset")


def landlock_version() -> int:
    """Return the version of Landlock that the kernel offers; 0 if none."""
    return max(0, _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1))


def landlock(readable: Iterable[str], writable: Iterable[str], devices: Iterable[str]) -> None:
    """Confine this thread and its children to the given folders and files with Landlock.

    Also restricts whatever the kernel's version supports: TCP (4), devices (5), outgoing signals
    and abstract sockets (6). Needs `no_new_privileges`.
    """
    version = landlock_version()
    files = (1 << 13) - 1  # execute, write, read, list, remove, make: supported by version 1
    for since, right in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)):
        files |= right if version >= since else 0
    network = 3 if version >= 4 else 0
    scope = 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", files, network, scope)[:size]
    rules = _call(_LANDLOCK_CREATE, "landlock", attributes, ctypes.c_size_t(size), ctypes.c_uint(0))
    read = 1 | 4 | 8  # execute, read a file, list a folder
    of_a_file = 1 | 2 | 4 | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    for paths, rights in ((readable, read), (writable, files), (devices, 2 | 4)):
        for path in paths:
            if Path(path).exists():
                allowed = rights if Path(path).is_dir() else rights & of_a_file
                _allow(rules, path, allowed)
    _call(_LANDLOCK_RESTRICT, "landlock", ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, handle)
        _call(
            _LANDLOCK_ADD, "landlock", ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0)
        )
    finally:
        os.close(handle)
