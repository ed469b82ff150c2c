"""Checks that the names in a configuration exist in the model.

PEFT ignores a name that matches nothing, so a typo would silently train, keep or exclude less than
requested.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from tlora.calibration.weights import is_hqq_linear
from tlora.config import TLoraConfig
from tlora.errors import did_you_mean


def ends_of(name: str) -> list[str]:
    """Return the names that PEFT matches a module by: its full name and each dotted suffix."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def name_faults(model: nn.Module, config: TLoraConfig) -> list[str]:
    """Return a sentence for each name or layer index that matches no module of ``model``."""
    # PEFT finds a shared module that trains in full under each of its names.
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    kind = type(model).__name__
    faults: list[str] = []
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(config, field)
        if isinstance(wanted, list):
            offer = f"; {linear_names(model)}" if field == "target_modules" else ""
            faults += unmatched(field, wanted, names, f"{kind} has this name{offer}")
    excluded = config.exclude_modules
    if isinstance(excluded, list):
        faults += _containers(model, excluded)
    elif excluded and not any(re.fullmatch(excluded, name) for name in names):
        faults.append(
            f"`exclude_modules` is {excluded!r}, a regex that matches the full name of no "
            f"module of {kind}; give names as a list: [{excluded}]."
        )
    return faults or list(_layer_faults(config, names))


def unmatched(field: str, wanted: Iterable[str], names: list[str], rest: str) -> Iterator[str]:
    """Yield a sentence for each name in ``wanted`` that matches none of ``names``.

    Args:
        field: the option that gives the names.
        wanted: names, or ends of them.
        names: full names of modules.
        rest: the sentence after "no module of ".
    """
    known = {end for name in names for end in ends_of(name)}
    for each in sorted(wanted):  # PEFT saves them in the order of a set
        if each not in known:
            hint = did_you_mean(each, sorted(end for end in known if end.count(".") < 2))
            yield f"`{field}` names {each!r}, but no module of {rest}.{hint}"


def linear_names(model: nn.Module) -> str:
    """List the names of the modules that can be adapted."""
    leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)}
    return f"its Linear and Conv1D modules are named {', '.join(sorted(leaves)) or '(none)'}"


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map that PEFT adapts, quantized or not."""
    return isinstance(module, nn.Linear | Conv1D) or is_hqq_linear(module)


def _containers(model: nn.Module, excluded: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for each excluded module whose inner Linears PEFT would still adapt."""
    found: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules():
        for end in ends_of(name):
            found[end].append(module)
    for each in excluded:
        if each in found and all(map(_holds_linears, found[each])):
            yield (
                f"`exclude_modules` names {each!r}, but PEFT still adapts the modules inside it; "
                f"name these, or give the regex {rf'.*{re.escape(each)}.*'!r}."
            )


def _holds_linears(module: nn.Module) -> bool:
    inside = (part for part in module.modules() if part is not module)
    return any(map(is_linear, inside))


def _layer_faults(config: TLoraConfig, names: list[str]) -> Iterator[str]:
    wanted = config.layers_to_transform
    if wanted is None:
        return
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    index_of = _layer_index(patterns)
    targets = config.target_modules
    if isinstance(targets, list):
        names = [name for name in names if not set(targets).isdisjoint(ends_of(name))]
    have = sorted({index for name in names if (index := index_of(name)) is not None})
    lists = sorted({m[1] for name in names for m in re.finditer(r"(?:^|\.)([^.]+)\.\d+\.", name)})
    if not have and patterns:
        hint = did_you_mean(patterns[0], lists)
        yield (
            f"`layers_pattern` is {config.layers_pattern!r}, which matches no list of layers; "
            f"choose one of: {', '.join(lists) or '(none)'}.{hint}"
        )
        return
    asked = [wanted] if isinstance(wanted, int) else wanted
    if missing := [each for each in asked if each not in have]:
        there = f"{have[0]} to {have[-1]}" if have else f"none ({', '.join(lists)})"
        yield (
            f"`layers_to_transform` names {', '.join(map(str, missing))}, but the layers of the"
            f" target modules are {there}."
        )


def _layer_index(patterns: list[str]) -> Callable[[str], int | None]:
    """Return the function that reads a module's layer index from its name, by PEFT's rules."""
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]

    def index_of(name: str) -> int | None:
        found = (re.match(rule, name) for rule in rules)
        return next((int(match[1]) for match in found if match), None)

    return index_of
