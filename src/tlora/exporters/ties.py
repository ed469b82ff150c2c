"""Tied weights of a model, and those that an adapter unties."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tlora.exporters.changes import Change
from tlora.exporters.checkpoint import Stored


class Ties:
    """The tied parameters of a model.

    Attributes:
        stored: the stored tensor of each parameter.
        apart: parameters changed by an adapter while their tied partners are not.
        split: parameters that get their own weights: all, if any are apart, because a
            configuration ties all or none.
    """

    def __init__(
        self, model: Any, in_files: Mapping[str, Stored], changes: Mapping[str, Change]
    ) -> None:
        self._changes = changes
        self._source: dict[str, str] = {}
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            here, there = in_files.get(target), in_files.get(source)
            # As in transformers: weights stored twice with two values are not tied.
            if here is None or there is None or torch.equal(here.read(), there.read()):
                self._source |= {target: source, source: source}
        self.stored = {}
        for name, source in self._source.items():
            members = [source, *(n for n, s in self._source.items() if s == source)]
            present = [in_files[member] for member in members if member in in_files]
            self.stored.update({name: present[0]} if present else {})
        self.apart = sorted(
            name for name, change in changes.items() if change.own and name in self._source
        )
        self.split = set(self._source) if self.apart else set()

    def follows(self, name: str) -> bool:
        """Return whether a parameter needs no stored weights."""
        return name in self._source and name not in self.split

    def change(self, name: str) -> Change | None:
        """Return a parameter's change; a replacement applies to all tied parameters."""
        own = self._changes.get(name)
        if name not in self._source:
            return own
        members = [n for n, s in self._source.items() if s == self._source[name]]
        changed = [self._changes[member] for member in members if member in self._changes]
        if not changed:
            return None
        first = next((each for each in changed if each.stands_for or each.rows), changed[0])
        own = own or Change(first.lora)
        return dataclasses.replace(
            own, stands_for=first.stands_for, rows=first.rows, indices=first.indices
        )
