"""The package's extras: the further packages of each verb, and checks that they are installed.

`pip install .` brings calibrate, plan, attach, save and load. Checking imports nothing.
"""

from __future__ import annotations

import importlib.util

from tlora.errors import ConfigError

_TRAIN = ("trl", "datasets", "rich", "yaml", "jinja2")
_COMPARE = (*_TRAIN, "scipy", "sklearn")
_EVAL = (*_COMPARE, "lm_eval", "math_verify", "antlr4", "pebble")
MODULES = {
    "train": _TRAIN,
    "compare": _COMPARE,
    "eval": _EVAL,
    "judge": (*_EVAL, "openai", "httpx2"),
    "quantized": ("bitsandbytes",),
    "gguf": ("gguf",),
    "ray": (*_COMPARE, "ray"),
}
"""Packages that each extra of pyproject.toml installs, by import name."""


def require(extra: str, where: str) -> None:
    """Raise unless all modules of ``extra`` are installed; ``where`` is the verb or the field.

    Raises:
        ConfigError: modules are missing; the sentence says what to install.
    """
    if lacking := missing(extra):
        are = "is" if len(lacking) == 1 else "are"
        raise ConfigError(f"{', '.join(lacking)} {are} not installed; run {install(extra)}.", where)


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'`pip install ".[{extra}]"` in the checkout of tlora'


def missing(extra: str) -> list[str]:
    """Return the modules of ``extra`` that are not installed."""
    return [name for name in MODULES[extra] if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
