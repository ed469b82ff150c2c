"""Whole runs by name: YAML files beside this one, each the lowest layer of `--preset NAME`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tlora.errors import ConfigError, did_you_mean
from tlora.registry import Entry

_FOLDER = Path(str(files("tlora.presets")))


def entries() -> list[Entry]:
    """Return every preset: its name, its file, and the first line of that as what it is."""
    return [
        Entry(file.stem, str(file), file.read_text(encoding="utf-8").split("\n", 1)[0].strip("# "))
        for file in sorted(_FOLDER.glob("*.yaml"))
    ]


def path(name: str) -> str:
    """Return the file of a preset.

    Raises:
        ConfigError: there is no such preset (with a suggestion).
    """
    known = {entry.name: entry.target for entry in entries()}
    if name not in known:
        hint = did_you_mean(name, known) or " Run `tlora list presets`."
        raise ConfigError(f"there is no preset {name!r}.{hint}", where="command line")
    return known[name]
