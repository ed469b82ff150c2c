"""System calls forbidden in a sandbox because they evade its limits.

Some memory counts toward no process: unnamed files (memfd_create) and System V's segments,
semaphores and queues. A new user namespace grants every right inside, including mounting a file
system of any size. Keys, tracing, BPF and io_uring are also forbidden, because programs do not need
them and they expose much of the kernel.

Sources: seccomp(2), <linux/seccomp.h>, <linux/filter.h>, and the call numbers of <asm/unistd.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import kernel

# Name -> its number on x86_64 and on aarch64.
REFUSED: dict[str, tuple[int, int]] = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "msgget": (68, 186),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pivot_root": (155, 41),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
CLONE = (56, 220)
CLONE3 = (435, 435)
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's calling convention (AUDIT_ARCH_...) by machine name of uname(2)."""

# CLONE_NEWCGROUP and those in `kernel`; clone has no CLONE_NEWTIME flag.
_NAMESPACES = (
    0x02000000
    | kernel.NEW_MOUNTS
    | kernel.NEW_HOSTNAME
    | kernel.NEW_IPC
    | kernel.NEW_USER
    | kernel.NEW_PROCESSES
    | kernel.NEW_NETWORK
)
_LOAD, _IS, _IS_AT_LEAST, _HAS_ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _CONVENTION, _FIRST_ARGUMENT = 0, 4, 16  # in struct seccomp_data, little-endian
_X32 = 0x40000000
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_SET_SECCOMP, _FILTER = 22, 2


def program(machine: str) -> bytes:
    """Return the filter for a ``machine``, as an array of struct sock_filter.

    Calls in `REFUSED`, and clone with a namespace, fail with EPERM; clone3, whose flags a filter
    cannot see, fails with ENOSYS, so that C libraries fall back to clone. Calls in another
    convention, with different numbers, end the process.

    Raises:
        OSError: that machine's call numbers are unknown.
    """
    if machine not in MACHINES:
        known = " and ".join(MACHINES)
        raise OSError(errno.ENOSYS, f"the call filter supports {known}, not {machine}")
    column = list(MACHINES).index(machine)
    refuse = _step(_RETURN, ERROR | errno.EPERM)
    steps = [
        _step(_LOAD, _CONVENTION),
        _step(_IS, MACHINES[machine], holds=1),
        _step(_RETURN, KILL),
        _step(_LOAD, _NUMBER),
        _step(_IS, CLONE3[column], fails=1),
        _step(_RETURN, ERROR | errno.ENOSYS),
    ]
    if machine == "x86_64":
        steps += [_step(_IS_AT_LEAST, _X32, fails=1), refuse]
    for numbers in REFUSED.values():
        steps += [_step(_IS, numbers[column], fails=1), refuse]
    steps += [
        _step(_IS, CLONE[column], fails=3),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_HAS_ANY_OF, _NAMESPACES, fails=1),
        refuse,
        _step(_RETURN, ALLOW),
    ]
    return b"".join(steps)


def refuse() -> None:
    """Install the filter permanently on this thread and everything it starts.

    Needs `kernel.no_new_privileges`.

    Raises:
        OSError: the kernel lacks such filters (CONFIG_SECCOMP_FILTER), or the machine is unknown.
    """
    steps = program(os.uname().machine)
    kept = ctypes.create_string_buffer(steps, len(steps))
    # struct sock_fprog; "P" has the C compiler's alignment.
    header = struct.pack("HP", len(steps) // 8, ctypes.addressof(kept))
    kernel.control(_SET_SECCOMP, "the call filter (seccomp)", ctypes.c_ulong(_FILTER), header)


def _step(code: int, value: int, holds: int = 0, fails: int = 0) -> bytes:
    """Return one instruction; a comparison skips ``holds`` or ``fails`` steps."""
    return struct.pack("HBBI", code, holds, fails, value)
