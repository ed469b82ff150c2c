"""Settings and whole runs by name: the YAML files in this folder, applied by `--preset NAME`.

A file may extend another one by `preset: NAME`. `DEFAULT` is its method's setting if a command
names no preset, and the setting of `TLoraConfig.recommended()` in Python.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from tlora.errors import ConfigError, did_you_mean
from tlora.registry import Entry
from tlora.yamlfiles import read_yaml

DEFAULT = "recommended"
_FOLDER = Path(str(files("tlora.presets")))


def entries() -> list[Entry]:
    """Return every preset: its name, its file, and the file's first line as its description."""
    return [
        Entry(file.stem, str(file), file.read_text(encoding="utf-8").split("\n", 1)[0].strip("# "))
        for file in sorted(_FOLDER.glob("*.yaml"), key=lambda file: file.stem)
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


def layers(name: str) -> list[dict[str, Any]]:
    """Return the values of a preset, including those of the preset that it extends.

    Raises:
        ConfigError: there is no such preset.
    """
    values = read_yaml(path(name))
    below = values.pop("preset", None)
    return [*(layers(below) if below else ()), values]


def default_options(method: str) -> dict[str, Any]:
    """Return the default options of ``method`` for a command without a preset."""
    (values,) = layers(DEFAULT)
    return values["adapter"] if method == values["method"] else {}
