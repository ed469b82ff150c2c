"""Isolate a program with namespaces, a private file system, an unprivileged user and limits."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

from . import kernel

SCRATCH = "/tmp"
"""Writable folder of the program, in its own file system."""

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
_SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
DEVICES = ("null", "zero", "full", "random", "urandom")
_FIRST_USER = 0x70000000
"""First of the unused user ids; each sandbox has one, because process limits count by user."""
_NOBODY = 65534


def readable() -> list[str]:
    """Return the paths that the program may read: the system's libraries and Python's."""
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    python |= {str(Path(path).resolve()) for path in python}
    paths: list[str] = []
    for path in [*_SYSTEM, *_SETTINGS, *sorted(python)]:
        if Path(path).exists() and not any(Path(path).is_relative_to(known) for known in paths):
            paths.append(path)
    return paths


def enter_namespaces() -> None:
    """Enter new namespaces for processes, network, IPC and host name; without root, users too.

    Children of this process are in the new process namespace, the first as its init.

    Raises:
        OSError: the kernel, or the container this runs in, does not allow it.
    """
    flags = kernel.NEW_PROCESSES | kernel.NEW_NETWORK | kernel.NEW_IPC | kernel.NEW_HOSTNAME
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        # Root in a container may lack the right; root in a user namespace would count as root for
        # the limits, so there is no fallback.
        kernel.unshare(flags)
        return
    kernel.unshare(flags | kernel.NEW_USER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1")


def enter_file_system(scratch_bytes: int) -> None:
    """Create a root of read-only copies of `readable`, a few devices, /proc and an empty scratch.

    Nothing else of the machine is visible. The scratch is in memory and disappears with the
    namespace. The parent keeps its own view for watching.
    """
    kernel.unshare(kernel.NEW_MOUNTS)
    kernel.mount(None, "/", None, kernel.SLAVE | kernel.RECURSIVE)
    paths = readable()
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "mode=755,size=4m")
    os.chdir("/tmp")
    Path("machine").mkdir()
    kernel.pivot_root(".", "machine")
    os.chdir("/")
    Path(SCRATCH).mkdir(exist_ok=True)
    kernel.mount(
        "tmpfs",
        SCRATCH,
        "tmpfs",
        kernel.NO_SUID | kernel.NO_DEVICES,
        f"mode=777,size={scratch_bytes},nr_inodes=10000",
    )
    for path in paths:
        _show(path)
    for device in DEVICES:
        _bind(f"/machine/dev/{device}", f"/dev/{device}")
    Path("/proc").mkdir()
    # A container with a partly hidden /proc does not allow mounting a full one; then there is none,
    # which most programs do not need.
    with contextlib.suppress(OSError):
        kernel.mount(
            "proc",
            "/proc",
            "proc",
            kernel.NO_SUID | kernel.NO_DEVICES | kernel.NO_EXECUTION,
        )
    kernel.detach("/machine")
    Path("/machine").rmdir()
    kernel.read_only("/", tree=False)
    os.chdir(SCRATCH)
    with contextlib.suppress(OSError):
        socket.sethostname("sandbox")


def _show(path: str) -> None:
    source = Path(f"/machine{path}")
    if source.is_symlink() and str(source.readlink()).startswith(("usr/", "/usr/")):
        Path(path).symlink_to(source.readlink())
        return
    # Resolve manually: in the new root, an absolute link would point nowhere.
    real = source
    while real.is_symlink():
        link = real.readlink()
        real = Path(f"/machine{link}") if link.is_absolute() else real.parent / link
    if real.exists():
        _bind(str(real), path)
        kernel.read_only(path)


def _bind(source: str, target: str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_dir():
        Path(target).mkdir(exist_ok=True)
    else:
        Path(target).touch()
    kernel.mount(source, target, None, kernel.BIND | kernel.RECURSIVE)


def become_nobody(number: int) -> None:
    """Drop root by becoming an otherwise unused user, and drop every capability.

    ``number`` is unique among the sandboxes of the machine at one time: a process id.
    """
    if os.geteuid() == 0:
        os.setgroups([])
        for user in (_FIRST_USER + number, _NOBODY):
            # A container may map fewer users than that.
            with contextlib.suppress(OSError):
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                break
    kernel.no_new_privileges()
    kernel.drop_capabilities()
    if os.geteuid() == 0:
        raise PermissionError("cannot drop root's rights here")
    if not os.access(sys.base_prefix, os.R_OK | os.X_OK):
        raise PermissionError(
            f"only root can read {sys.base_prefix}; run as an ordinary user, or use a Python"
            " outside root's folders"
        )


def threads_of_this_user() -> int:
    """Return the user's number of threads, which the process limit counts."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid():
                count += sum(1 for _ in (folder / "task").iterdir())
    return count


def set_limits(limits: dict[str, Any], processes: int) -> None:
    """Set the kernel's limits per process; none can be raised again."""
    cpu = int(limits["cpu_seconds"])
    values = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file_size"],
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, wanted in values.items():
        hard = resource.getrlimit(limit)[1]
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(limit, (most, most))
    # SIGXCPU at the first limit, SIGKILL at the second for programs that catch SIGXCPU.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
