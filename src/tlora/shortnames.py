"""Short names of common fields: `--learning_rate` for `--trainer.learning_rate`.

They are accepted as flags and at the top level of a YAML file, and expanded at once, so that a
record, a run folder and `--print_config` only contain full names.
"""

from __future__ import annotations

import typing
from typing import Any

from tlora.checks import Section, hints

SHORT: dict[str, tuple[str, str]] = {
    "learning_rate": (
        "trainer.learning_rate",
        "Learning rate; by default the method's own for the size of the model.",
    ),
    "epochs": ("trainer.num_train_epochs", "Passes over the training rows (default: 3)."),
    "batch_size": (
        "trainer.per_device_train_batch_size",
        "Training rows per step and device (default: 8).",
    ),
    "max_steps": ("trainer.max_steps", "Optimizer steps, in place of epochs."),
    "r": ("adapter.r", "Rank of the adapter; by default the method's own."),
    "alpha": (
        "adapter.lora_alpha",
        "The adapter's output is scaled by alpha / r; by default the method's own.",
    ),
    "for": ("server", "Reader of the result: vllm, sglang, llama.cpp, ollama, ..."),
}
"""The full name and the help of each."""


def short_names(record: type[Section]) -> dict[str, str]:
    """Return the short names that a verb with this record accepts, and their full names.

    A field of that name takes precedence. `tlora compare` tunes the learning rate, so it has no
    short name for it.
    """
    own = record.field_names()
    is_open = {name for name, kind in hints(record).items() if typing.get_origin(kind) is dict}
    return {
        short: full
        for short, (full, _) in SHORT.items()
        if full in own or (full.partition(".")[0] in is_open and not {short, f"{short}s"} & {*own})
    }


def written_out(values: dict[str, Any], shorts: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a file under their full names, and a sentence for each contradiction."""
    full = {name: value for name, value in values.items() if name not in shorts}
    faults = []
    for short in (name for name in shorts if name in values):
        section, dot, name = shorts[short].partition(".")
        if not dot:
            faults += contradiction(short, values[short], section, full.get(section, values[short]))
            full[section] = values[short]
            continue
        inner = full.get(section) or {}
        if not isinstance(inner, dict):
            continue  # which the record refuses
        faults += contradiction(short, values[short], shorts[short], inner.get(name, values[short]))
        full[section] = inner | {name: values[short]}
    return full, faults


def contradiction(short: str, value: Any, full: str, other: Any) -> list[str]:
    """Return a sentence if a field gets two values by its two names, else None."""
    if value == other:
        return []
    return [
        f"`{short}` is {value!r} and `{full}` is {other!r}, two names of one field; give one of"
        " them."
    ]
