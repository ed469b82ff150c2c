"""What is said of each reader, on the screen and in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tlora.errors import listed
from tlora.exporters.readers import Reading

_WORST = 3
"""Modules that a line names."""


@dataclass
class Verdict:
    """What a reader makes of an artifact."""

    reader: str
    """A short name."""
    title: str
    servers: tuple[str, ...]
    """The names that `--for` takes for it."""
    error: float | None = None
    """Norm of the difference over the norm of the adapter's effect; None where it is not known."""
    refused: str | None = None
    """Why it is not read at all."""
    rounding: float = 0.0
    """The error that the precision explains."""
    exact: bool = False
    """Whether there is no error but that of rounding."""
    modules: dict[str, float] = field(default_factory=dict)
    """The errors of the modules that are off, each of its own effect."""
    faults: list[str] = field(default_factory=list)
    """What else is wrong, a noun phrase each: tensors that are missing, or too many."""

    @classmethod
    def of(cls, reading: Reading, faults: Sequence[str] = ()) -> Verdict:
        """Return what a reading says, and what else was found."""
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
    """Return a line a reader."""
    width = max(len(verdict.title) for verdict in verdicts)
    return "\n".join(f"{verdict.title:<{width}}  {verdict.words()}" for verdict in verdicts)
