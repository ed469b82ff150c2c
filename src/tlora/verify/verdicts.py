"""Verdicts on each reader, for the screen and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tlora.errors import listed
from tlora.exporters.readers import Reading

_WORST = 3
"""Maximum number of modules listed in a line."""


@dataclass
class Verdict:
    """A verdict on a reader of an artifact."""

    reader: str
    """A short name."""
    title: str
    servers: tuple[str, ...]
    """Its names in `--for`."""
    error: float | None = None
    """Norm of the difference over the norm of the adapter's effect; None if unknown."""
    refused: str | None = None
    """Reason why the reader rejects it."""
    rounding: float = 0.0
    """The error explained by precision."""
    exact: bool = False
    """Whether the only error is rounding."""
    modules: dict[str, float] = field(default_factory=dict)
    """Relative errors of the inexact modules."""
    faults: list[str] = field(default_factory=list)
    """Other faults, one noun phrase each: missing or extra tensors."""

    @classmethod
    def of(cls, reading: Reading, faults: Sequence[str] = ()) -> Verdict:
        """Build the verdict from a reading and other faults."""
        reader = reading.reader
        return cls(
            reader.name,
            reader.title,
            reader.servers,
            reading.error,
            reading.refused,
            reading.rounding,
            reading.exact and not faults,
            reading.modules,
            [*faults],
        )

    def words(self) -> str:
        """Return the verdict in words."""
        if self.refused is not None:
            return f"refused: {self.refused}"
        if self.exact:
            tiny = not self.error or self.error < _SHOWN
            return "exact" if tiny else f"exact up to rounding ({self.error:.1e} of the update)"
        said = []
        if self.modules:
            size = "all of it" if self.error == math.inf else f"{self.error:.2g} of the update"
            worst = sorted(self.modules, key=lambda name: -self.modules[name])
            said.append(f"wrong by {size} ({len(worst)} modules: {listed(worst, _WORST)})")
        return "; ".join([*said, *self.faults]) or f"wrong by {self.error:.2g} of the update"

    def record(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite error is null."""
        finite = {n: e if math.isfinite(e) else None for n, e in self.modules.items()}
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        shown = {"verdict": self.words(), "error": error, "modules": finite}
        return {**vars(self), "servers": [*self.servers], **shown}


_SHOWN = 1e-12


def table(verdicts: Sequence[Verdict]) -> str:
    """Return one line per reader, and the meaning of "exact" if one is."""
    width = max(len(verdict.title) for verdict in verdicts)
    lines = [f"{verdict.title:<{width}}  {verdict.words()}" for verdict in verdicts]
    if any(verdict.exact for verdict in verdicts):
        lines.append("exact: the server applies the same update that was trained.")
    return "\n".join(lines)


def outdated(own: Verdict, export: str, adapter: str, modules: int) -> str:
    """Explain that an export differs from the adapter, whichever program reads it.

    Args:
        own: PEFT's verdict on the export, not exact.
        export: path of the export, as typed.
        adapter: path of the run or adapter, as typed.
        modules: the adapter's number of modules.
    """
    said = [*own.faults]
    if own.modules or not said:
        names = sorted(own.modules, key=lambda name: -own.modules[name])
        which = f": {listed(names, _WORST)}" if 0 < len(names) < modules else ""
        size = "the updates differ"
        if own.error is not None and math.isfinite(own.error):
            size += f" by {own.error:.2g} of {adapter}'s"
        said.insert(0, f"{size} ({len(names)} of {modules} modules{which})")
    return (
        f"{export} does not hold the adapter in {adapter}: {'; '.join(said)}. If {adapter} was"
        " trained after the export, export it again; if it was exported with --max_rank, give the"
        " same --max_rank here."
    )
