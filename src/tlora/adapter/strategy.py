"""How second moments are made within a memory budget, settled before anything is measured.

- in blocks: the pass that measures sensitivities, which runs the whole model anyway, keeps the
  moments of the last modules that fit the budget; each further block takes a forward pass that
  stops after its last module, so K blocks cost about (K - 1) / 2 forward passes more than one;
- streamed: `PASSES` forward passes a run of modules, each with two d x l blocks (`streams`);
- mapped, where the statistics are kept in a file (`calibrate`): one pass, and what is beyond the
  budget is in memory-mapped files (`calibration/spill.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tlora.calibration.bank import moment_bytes
from tlora.calibration.spill import spill_budget
from tlora.calibration.streams import stream_bytes
from tlora.config import TLoraConfig, bytes_text
from tlora.linalg.streamed import PASSES

T = TypeVar("T")


class Shaped(Protocol):
    """A module whose shape is known; a `Target`, or one without weights."""

    @property
    def name(self) -> str:
        """Its full name."""
        ...

    @property
    def d_in(self) -> int:
        """Columns of its weight."""
        ...

    @property
    def d_out(self) -> int:
        """Rows of its weight."""
        ...


@dataclass(frozen=True)
class Strategy:
    """Which second moments are held when.

    Attributes:
        blocks: names of the modules whose moments are held together. The first block is filled by
            the pass that measures sensitivities, each other one by a pass of its own.
        streamed: names of the modules whose subspace is found without their moment.
        stream_runs: runs that the streamed modules take at the base rank; allocation may change it.
        held: bytes of second moments (or streaming blocks) held at a time, at the most.
        total: bytes that the moments of all modules would take at once.
        budget: the bytes that were asked for, or None.
        mapped: bytes of second moments in mapped files.
    """

    blocks: tuple[tuple[str, ...], ...]
    streamed: frozenset[str]
    stream_runs: int
    held: int
    total: int
    budget: int | None
    mapped: int = 0

    @property
    def passes(self) -> int:
        """Passes over the samples: one, one for each further block, three for each run."""
        return max(1, len(self.blocks)) + PASSES * self.stream_runs

    def summary(self) -> str:
        """Say in a line what is held, how, and in how many passes."""
        exact = sum(map(len, self.blocks))
        if not exact and not self.streamed:
            return "no second moments; 1 pass over the samples"
        parts = []
        if exact:
            how = "at once" if len(self.blocks) == 1 else f"in {len(self.blocks)} blocks"
            parts.append(f"{exact} modules exact, {how}")
        if self.streamed:
            parts.append(f"{len(self.streamed)} modules streamed")
        passes = f"{self.passes} pass{'es' if self.passes > 1 else ''} over the samples"
        mapped = f", {bytes_text(self.mapped)} in mapped files" if self.mapped else ""
        return (
            f"second moments: {'; '.join(parts)}; {passes}; at most {bytes_text(self.held)} held"
            f"{mapped} (all of them: {bytes_text(self.total)})"
        )


def choose(
    modules: Sequence[Shaped], sources: Mapping[str, Hashable], config: TLoraConfig
) -> Strategy:
    """Settle how the second moments of ``modules`` are made.

    Args:
        modules: in model order.
        sources: by name: equal for modules that read the same tensors; a module that is not there
            has an input of its own.
        config: its `covariance`, `memory_budget`, and whether moments are needed at all.
    """
    budget = config.memory_budget_bytes
    if not config.needs_moments:
        return Strategy((), frozenset(), 0, 0, 0, budget)
    streamed = _streamed(modules, config)
    groups: dict[Hashable, list[Shaped]] = {}
    for module in modules:
        groups.setdefault(sources.get(module.name, module.name), []).append(module)
    total = sum(moment_bytes(group[0].d_in) for group in groups.values())
    exact = [
        (kept, moment_bytes(kept[0].d_in))
        for group in groups.values()
        if (kept := [m for m in group if m.name not in streamed])
    ]
    # Packed from the end: the first pass runs the whole model anyway, the others stop early.
    blocks = packed(reversed(exact), budget)
    runs = stream_runs(
        [(m, m.d_in, min(config.r, m.d_in, m.d_out)) for m in modules if m.name in streamed], budget
    )
    return Strategy(
        # Run by run back in model order, but for the first.
        blocks=tuple(
            tuple(module.name for group in reversed(block) for module in group)
            for block, _ in [*blocks[:1], *reversed(blocks[1:])]
        ),
        streamed=streamed,
        stream_runs=len(runs),
        held=max((size for _, size in [*blocks, *runs]), default=0),
        total=total,
        budget=budget,
    )


def choose_mapped(
    modules: Sequence[Shaped], sources: Mapping[str, Hashable], config: TLoraConfig
) -> Strategy:
    """Say how the second moments of ``modules`` are made where all are kept; as for `choose`."""
    budget = config.memory_budget_bytes
    sizes = {sources.get(m.name, m.name): moment_bytes(m.d_in) for m in modules}
    if not config.needs_moments:
        sizes = {}
    total = sum(sizes.values())
    room = spill_budget(config)
    if room is None:
        room = total
    held = 0
    for size in sizes.values():
        held += size if held + size <= room else 0
    names = tuple(module.name for module in modules)
    blocks = (names,) if sizes else ()
    return Strategy(blocks, frozenset(), 0, held, total, budget, total - held)


def stream_runs(
    modules: Iterable[tuple[T, int, int]], budget: int | None
) -> list[tuple[list[T], int]]:
    """Cut modules, given with their columns and ranks, into runs whose blocks fit the budget."""
    return packed(
        ((module, stream_bytes(columns, rank)) for module, columns, rank in modules), budget
    )


def packed(pieces: Iterable[tuple[T, int]], budget: int | None) -> list[tuple[list[T], int]]:
    """Join pieces of known bytes, in order, into runs within the budget (a piece at least).

    Returns:
        The pieces of each run, and its bytes.
    """
    runs: list[tuple[list[T], int]] = []
    for piece, size in pieces:
        if runs and (budget is None or runs[-1][1] + size <= budget):
            runs[-1] = ([*runs[-1][0], piece], runs[-1][1] + size)
        else:
            runs.append(([piece], size))
    return runs


def _streamed(modules: Sequence[Shaped], config: TLoraConfig) -> frozenset[str]:
    """Return the names of the modules whose second moments are not to be held."""
    budget = config.memory_budget_bytes
    if config.covariance == "exact":
        return frozenset()
    if config.covariance == "streamed":
        return frozenset(module.name for module in modules)
    if budget is None or config.whiten:
        return frozenset()
    return frozenset(m.name for m in modules if moment_bytes(m.d_in) > budget)
