"""Cost of each way to make second moments, in multiply-adds, from shapes and tokens only.

The count covers the differences between the ways: passes after the first, products with C, and the
factorizations. Every token counts for every module, even if routing brings it to few experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from tlora.calibration.accumulators import moment_bytes
from tlora.calibration.weights import Target
from tlora.config import TLoraConfig
from tlora.linalg.streamed import PASSES, block_width


class Shaped(Protocol):
    """A module with a known name and shape: a `Target`, or one without weights."""

    @property
    def name(self) -> str:
        """Its full name."""
        ...

    @property
    def d_in(self) -> int:
        """d, columns of its weight."""
        ...

    @property
    def d_out(self) -> int:
        """m, rows of its weight."""
        ...


@dataclass(frozen=True)
class Work:
    """Cost of passes over the samples.

    Attributes:
        tokens: real tokens of all samples.
        through: by module, the parameters of the model up to its end, i.e. multiply-adds per token.
        rank: r, the expected rank of every module.
    """

    tokens: int
    through: Mapping[str, int]
    rank: int

    def passes(self, runs: Iterable[Iterable[str]]) -> int:
        """Return the cost of forward passes, one for each run, up to the end of its last module."""
        return self.tokens * sum(max(self.through[name] for name in run) for run in runs)

    def forming(self, columns: int) -> int:
        """Return the cost of C, of which only the lower triangle is formed; zero for few tokens."""
        return 0 if self._keeps_rows(columns) else self.tokens * columns**2 // 2

    def exact(self, module: Shaped) -> int:
        """Return the cost of W C and its sketch; for few tokens W C stays in two factors."""
        rows, columns, rank = module.d_out, module.d_in, self._rank(module)
        width = rank + max(32, rank // 2)
        inner = self.tokens if self._keeps_rows(columns) else columns
        return rows * columns * inner + 8 * rows * columns * width

    def streamed(self, module: Shaped) -> int:
        """Return the cost of three products with C, with W in between."""
        width = block_width(module.d_in, self._rank(module))
        return PASSES * 2 * module.d_in * width * (self.tokens + module.d_out)

    def _keeps_rows(self, columns: int) -> bool:
        """Return whether a moment of few tokens keeps its rows and does not form C."""
        return 4 * self.tokens * columns <= moment_bytes(columns)

    def _rank(self, module: Shaped) -> int:
        return min(self.rank, module.d_in, module.d_out)


def multiply_adds(
    modules: Sequence[Shaped],
    sources: Mapping[str, Hashable],
    blocks: Sequence[Iterable[str]],
    streams: Sequence[Iterable[str]],
    work: Work,
) -> int:
    """Return the cost of a strategy.

    Args:
        modules: all.
        sources: by name: equal for modules that read the same tensors.
        blocks: names of the exact modules, by block; the first block has no pass of its own.
        streams: names of the streamed modules, by run.
        work: cost of passes.
    """
    streamed = {name for run in streams for name in run}
    exact = [module for module in modules if module.name not in streamed]
    formed = {sources.get(module.name, module.name): module.d_in for module in exact}
    return (
        work.passes(blocks[1:])
        + PASSES * work.passes(streams)
        + sum(map(work.forming, formed.values()))
        + sum(map(work.exact, exact))
        + sum(work.streamed(module) for module in modules if module.name in streamed)
    )


def work_of(model: nn.Module, targets: Sequence[Target], config: TLoraConfig, tokens: int) -> Work:
    """Return the cost of passes of ``tokens`` through a model, in the order of its modules.

    A target counts with its shape, regardless of its storage format.
    """
    inside: dict[int, list[Target]] = {}
    for target in targets:
        inside.setdefault(id(target.module), []).append(target)
    through: dict[str, int] = {}
    total = 0
    for module in model.modules():
        held = inside.get(id(module), ())
        own = sum(_entries(parameter) for parameter in module.parameters(recurse=False))
        total += sum(target.d_in * target.d_out for target in held) or own
        through |= {target.name: total for target in held}
    return Work(tokens, through, config.r)


def _entries(parameter: nn.Parameter) -> int:
    # DeepSpeed keeps the full count beside an emptied parameter.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
