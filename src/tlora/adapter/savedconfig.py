"""Checks the adapter_config.json fields that decide ranks, scales and targets.

PEFT accepts any value there and fails later elsewhere, or computes with it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tlora.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (TypeError, re.error):
        return False
    return isinstance(value, str)


def _is_list(value: Any, kind: type = str) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _all_values(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the check of a `rank_pattern` or `alpha_pattern`."""
    return lambda value: (
        isinstance(value, Mapping)
        and all(_is_pattern(key) and check(each) for key, each in value.items())
    )


def _is_rows(value: Any) -> bool:
    return all(_is_list(rows, int) for rows in (value.values() if _is_table(value) else [value]))


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive integer", _is_rank),
    "lora_alpha": ("a finite number", _is_alpha),
    "rank_pattern": ("regular expressions with positive integers", _all_values(_is_rank)),
    "alpha_pattern": ("regular expressions with finite numbers", _all_values(_is_alpha)),
    "target_modules": ("names or a regular expression", lambda v: _is_list(v) or _is_pattern(v)),
    "exclude_modules": ("names or a regular expression", lambda v: _is_list(v) or _is_pattern(v)),
    "modules_to_save": ("a list of names", _is_list),
    "layers_to_transform": ("layer numbers", lambda v: type(v) is int or _is_list(v, int)),
    "layers_pattern": ("names", lambda v: isinstance(v, str) or _is_list(v)),
    "trainable_token_indices": ("token ids", _is_rows),
    "base_model_name_or_path": ("a name", lambda v: isinstance(v, str)),
    "revision": ("a name", lambda v: isinstance(v, str)),
    "task_type": ("a name", lambda v: isinstance(v, str)),
    "bias": ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
}
_NEEDED = ("r", "lora_alpha")
"""Fields that may be missing but not null."""


def check_fields(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Check a LoRA's configuration, which anyone may have written.

    Args:
        path: the adapter's folder.
        fields: of its adapter_config.json.

    Raises:
        AdapterError: PEFT could not read a field, or would compute with a value like NaN.
    """
    if fault := next(_faults(fields), None):
        raise AdapterError(
            f"{path}: {CONFIG} has {fault}; the folder was edited, save the adapter again."
        )


def _faults(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, (what, fits) in _RULES.items():
        value = fields.get(name)
        if name in fields and (value is not None or name in _NEEDED) and not fits(value):
            yield f"`{name}: {str(value)[:60]}`, which is not {what}"
    if isinstance(fields.get("target_modules"), str):
        for name in ("layers_to_transform", "layers_pattern"):
            if fields.get(name) is not None:
                yield f"`{name}` beside a `target_modules` that is a regular expression"
    if fields.get("layers_pattern") and not fields.get("layers_to_transform"):
        yield "`layers_pattern` without `layers_to_transform`"
