"""Small file systems of a case's own, where the system lets us mount any."""

from __future__ import annotations

import functools
import os
import subprocess


class mounted:
    """Mount by the words of `mount`, the last of which is the folder, while the body runs."""

    def __init__(self, *words: object) -> None:
        self._words = [str(word) for word in words]

    def __enter__(self) -> None:
        subprocess.run(["mount", *self._words], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self._words[-1]], check=True)


@functools.cache
def can_mount() -> bool:
    """Return whether file systems may be mounted here; else the system's answers are injected."""
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return (
            os.geteuid() == 0
            and subprocess.run(probe, check=False, capture_output=True).returncode == 0
        )
    except FileNotFoundError:
        return False
