"""An environment that holds a built wheel of tlora and what it asks for, and no other package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[2]
_SOURCES = ("pyproject.toml", "README.md", "LICENSE")


def build(folder: Path) -> Path:
    """Build a wheel of this checkout in ``folder``, from a copy; return its path."""
    copy = folder / "project"
    shutil.copytree(
        PROJECT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in _SOURCES:
        shutil.copy(PROJECT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *flags, str(copy)], check=True, capture_output=True)
    (wheel,) = folder.glob("tlora-*.whl")
    return wheel


def requirements(wheel: Path, folder: Path) -> list[Requirement]:
    """Unpack ``wheel`` into ``folder``, as installing it does; return what it requires."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (installed,) = metadata.distributions(name="tlora", path=[str(folder)])
    return [Requirement(text) for text in installed.requires or []]


def closure(wanted: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that pip would install for ``wanted``, by name."""
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    waiting = list(wanted)
    while waiting:
        each = waiting.pop()
        key = canonicalize_name(each.name), frozenset(each.extras)
        if key in done:
            continue
        done.add(key)
        found[key[0]] = metadata.distribution(each.name)
        for text in found[key[0]].requires or []:
            requirement = Requirement(text)
            if applies(requirement, each.extras):
                waiting.append(requirement)
    return found


def applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    """Return whether pip installs ``requirement`` here for the given extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras))


def _tops(distribution: metadata.Distribution) -> Iterator[Path]:
    """Yield the files and folders that a distribution has put into its site-packages."""
    home = Path(str(distribution.locate_file("")))
    for name in {file.parts[0] for file in distribution.files or []}:
        if name not in ("..", "__pycache__") and not name.endswith(".pth"):
            yield home / name


def bare(wheel: Path, folder: Path) -> Path:
    """Fill ``folder`` with what `pip install WHEEL` would; packages are linked, not copied."""
    wanted = [each for each in requirements(wheel, folder) if applies(each)]
    for distribution in closure(wanted).values():
        for path in _tops(distribution):
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


class Python:
    """An interpreter that sees one environment."""

    def __init__(self, command: list[str], path: Path | None = None) -> None:
        self.command = command
        self.variables = {} if path is None else {"PYTHONPATH": str(path)}

    def run(self, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run ``python words...`` in ``folder``."""
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.run(
            [*self.command, *words],
            cwd=folder,
            env=inherited | offline | self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
