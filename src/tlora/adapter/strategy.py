"""Chooses how to make second moments and gradients within a memory budget, before measuring.

There are two ways; `covariance="auto"` takes the cheapest combination (`costs`):

- in blocks: the pass that measures sensitivities, which runs the whole model anyway, keeps the
  moments of the last modules that fit the budget; each further block takes a forward pass that
  stops after its last module, so K blocks cost about (K - 1) / 2 forward passes more than one (if
  the basis needs gradients, which are never streamed: a whole forward pass, and a backward pass to
  its first module);
- streamed: `PASSES` forward passes per run of modules, each with two d x l blocks (`streams`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from tlora.adapter.costs import Shaped, Work, multiply_adds
from tlora.calibration.accumulators import moment_bytes
from tlora.calibration.streams import stream_bytes
from tlora.config import TLoraConfig, bytes_text
from tlora.linalg.streamed import PASSES

T = TypeVar("T")


_WORTH = 1.2
"""Streaming is less accurate: it is used only if exact costs more than this many times as much."""


@dataclass(frozen=True)
class Strategy:
    """Which second moments and gradients are in memory in which pass.

    Attributes:
        blocks: names of the modules whose moments (and gradients) are in memory together. The pass
            that measures sensitivities fills the first block, which may be empty; each other block
            has its own pass.
        streams: names of the modules whose subspace is computed without their moment, by run of
            three passes at the base rank; allocation may change the runs.
        held: maximum bytes of moments (or streaming blocks) in memory at a time.
        total: bytes of all modules' moments together.
        kind: their name in messages.
    """

    blocks: tuple[tuple[str, ...], ...]
    streams: tuple[tuple[str, ...], ...]
    held: int
    total: int
    kind: str = "second moments"

    @property
    def streamed(self) -> frozenset[str]:
        """Names of the streamed modules."""
        return frozenset(chain(*self.streams))

    @property
    def passes(self) -> int:
        """Passes over the samples: one, plus one per further block, plus three per run."""
        return max(1, len(self.blocks)) + PASSES * len(self.streams)

    def summary(self) -> str:
        """Describe in one line the memory, the way and the number of passes."""
        exact = sum(map(len, self.blocks))
        if not exact and not self.streamed:
            return "calibration needs no second moments and reads the samples once"
        parts = []
        if exact:
            filled = sum(map(bool, self.blocks))
            how = "all at once" if filled == 1 else f"in {filled} blocks"
            parts.append(f"computes the {self.kind} of {exact} modules exactly, {how}")
        if self.streamed:
            which = "those" if exact else f"the {self.kind}"
            parts.append(f"streams {which} of {len(self.streamed)} modules")
        reads = "once" if self.passes == 1 else f"{self.passes} times"
        return (
            f"calibration {' and '.join(parts)}; it reads the samples {reads} and holds at most"
            f" {bytes_text(self.held)} at a time ({bytes_text(self.total)} in all)"
        )


def choose(
    modules: Sequence[Shaped],
    sources: Mapping[str, Hashable],
    config: TLoraConfig,
    work: Work | None = None,
    first: int | None = None,
) -> Strategy:
    """Choose how the second moments of ``modules`` are made.

    Args:
        modules: in model order.
        sources: by name: equal for modules that read the same tensors; a module without an entry
            has its own input.
        config: its `covariance`, `memory_budget`, and whether moments are needed at all.
        work: cost of passes, by which "auto" compares the ways; None: exact wherever possible.
        first: bytes of the budget for the first pass; None: all of it.
    """
    if not _holds_anything(config):
        return Strategy((), (), 0, 0)
    candidates = _candidates(modules, config)
    ways = [_way(modules, sources, config, streamed, first) for streamed in candidates]
    if work is None or len(ways) == 1:
        return ways[0]
    costs = [multiply_adds(modules, sources, way.blocks, way.streams, work) for way in ways]
    if costs[0] <= _WORTH * min(costs):
        return ways[0]
    return ways[costs.index(min(costs))]


def _way(
    modules: Sequence[Shaped],
    sources: Mapping[str, Hashable],
    config: TLoraConfig,
    streamed: frozenset[str],
    first: int | None = None,
) -> Strategy:
    """Return the strategy that streams ``streamed`` and makes the other modules exact in blocks."""
    budget = config.memory_budget_bytes
    groups: dict[Hashable, list[Shaped]] = {}
    for module in modules:
        groups.setdefault(_source(module, sources, config), []).append(module)
    total = sum(_bytes(group, config) for group in groups.values())
    exact = [
        (kept, _bytes(kept, config))
        for group in groups.values()
        if (kept := [m for m in group if m.name not in streamed])
    ]
    # Packed from the end: the first pass runs the whole model anyway, the others stop early.
    blocks = packed(reversed(exact), budget, first)
    runs = stream_runs(
        [(m, m.d_in, min(config.r, m.d_in, m.d_out)) for m in modules if m.name in streamed], budget
    )
    return Strategy(
        # The runs return to model order, except the first.
        blocks=tuple(
            tuple(module.name for group in reversed(block) for module in group)
            for block, _ in [*blocks[:1], *reversed(blocks[1:])]
        ),
        streams=tuple(tuple(module.name for module in run) for run, _ in runs),
        held=max((size for _, size in [*blocks, *runs]), default=0),
        total=total,
        kind=_kind(config),
    )


def gradient_bytes(rows: int, columns: int, config: TLoraConfig) -> int:
    """Return the bytes of a module's gradient statistic for the basis: G, m x d, or N, d x d."""
    mean = 4 * rows * columns if config.needs_gradient else 0
    return mean + (moment_bytes(columns) if config.needs_gradient_moment else 0)


def _bytes(group: Sequence[Shaped], config: TLoraConfig) -> int:
    """Return the bytes kept for modules that read the same tensors."""
    shared = moment_bytes(group[0].d_in) if config.needs_moments else 0
    return shared + sum(gradient_bytes(m.d_out, m.d_in, config) for m in group)


def _source(module: Shaped, sources: Mapping[str, Hashable], config: TLoraConfig) -> Hashable:
    return sources.get(module.name, module.name) if config.needs_moments else module.name


def _holds_anything(config: TLoraConfig) -> bool:
    return config.needs_moments or config.needs_gradient or config.needs_gradient_moment


def _kind(config: TLoraConfig) -> str:
    wanted = {
        "second moments": config.needs_moments,
        "mean gradients": config.needs_gradient,
        "gradient-weighted moments": config.needs_gradient_moment,
    }
    return " and ".join(kind for kind, needed in wanted.items() if needed)


def stream_runs(
    modules: Iterable[tuple[T, int, int]], budget: int | None
) -> list[tuple[list[T], int]]:
    """Split modules, given with their columns and ranks, into runs whose blocks fit the budget."""
    return packed(
        ((module, stream_bytes(columns, rank)) for module, columns, rank in modules), budget
    )


def packed(
    pieces: Iterable[tuple[T, int]], budget: int | None, first: int | None = None
) -> list[tuple[list[T], int]]:
    """Join pieces of known size, in order, into runs within the budget (at least one piece each).

    Args:
        pieces: with their bytes.
        budget: of each run; None: no limit.
        first: a smaller budget of the first run, which may then be empty; None: the same budget.

    Returns:
        The pieces of each run, and its bytes.
    """
    runs: list[tuple[list[T], int]] = []
    for piece, size in pieces:
        if not runs and budget and first is not None and first < min(size, budget):
            runs.append(([], 0))
            first = 0
        limit = first if len(runs) == 1 and first is not None else budget
        if runs and (limit is None or runs[-1][1] + size <= limit):
            runs[-1] = ([*runs[-1][0], piece], runs[-1][1] + size)
        else:
            runs.append(([piece], size))
    return runs


def _candidates(modules: Sequence[Shaped], config: TLoraConfig) -> list[frozenset[str]]:
    """Return the names of the modules that each strategy streams, fewest first."""
    budget = config.memory_budget_bytes
    if config.covariance == "streamed":
        return [frozenset(module.name for module in modules)]
    if config.covariance == "exact" or budget is None or config.whiten or not config.streams:
        return [frozenset()]
    # A module whose own moment exceeds the budget is always streamed.
    widths = sorted({m.d_in for m in modules}, reverse=True)
    least = [[d for d in widths if moment_bytes(d) > budget]]
    wanted = least + [widths[: count + 1] for count in range(len(least[0]), len(widths))]
    return [frozenset(m.name for m in modules if m.d_in in taken) for taken in wanted]
