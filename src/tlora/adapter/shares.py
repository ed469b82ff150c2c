"""What each adapter gets of the budget, by its sensitivity: a rank and a scale.

PEFT adapts a fused parameter as a whole: one rank r and one scale for its E experts, lora_A with
E r rows (expert e owns rows e r to (e + 1) r), lora_B with E r columns. So the budget is shared out
among adapters, not among experts; each expert then gets r directions of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from tlora.calibration.module_statistics import ModuleStatistics
from tlora.calibration.weights import Target
from tlora.config import SensitivityRule, TLoraConfig
from tlora.linalg.allocation import (
    RankAllocation,
    RankBounds,
    allocate_ranks,
    allocate_ranks_by_cost,
    allocate_scales,
    equal_ranks,
)


@dataclass(frozen=True)
class Shares:
    """How the budget was shared out: by name of the target, and what of it was spent."""

    of: dict[str, Share]
    ranks: RankAllocation


@dataclass(frozen=True)
class Share:
    """What a module gets of the budget.

    Attributes:
        index: the module's place among the targets; seeds its random numbers.
        rank: r_i.
        scale: s_i.
    """

    index: int
    rank: int
    scale: float


def allocate(
    targets: Sequence[Target], statistics: Sequence[ModuleStatistics], config: TLoraConfig
) -> Shares:
    """Share ranks and scales out by the modules' sensitivities; no second moment is looked at.

    The experts of a parameter count as one module and get the same rank and scale.

    Raises:
        CalibrationError: ``config`` allocates, but sensitivities were not measured.
    """
    groups = grouped(targets, statistics)
    ranks = _ranks(groups, config)
    each = zip(groups, ranks.ranks, _scales(groups, config), strict=True)
    of: dict[str, Share] = {}
    for group, rank, scale in each:
        of |= {t.name: Share(len(of) + i, rank, scale) for i, t in enumerate(group.targets)}
    return Shares(of, ranks)


@dataclass(frozen=True)
class Group:
    """The targets of one adapter: a module, or all experts of a parameter.

    Attributes:
        name: of the module or parameter.
        targets: one, or E.
        statistics: of each.
    """

    name: str
    targets: tuple[Target, ...]
    statistics: tuple[ModuleStatistics, ...]

    @property
    def d_in(self) -> int:
        """d of each target."""
        return self.targets[0].d_in

    @property
    def d_out(self) -> int:
        """m of each target."""
        return self.targets[0].d_out

    def sensitivity(self, rule: SensitivityRule) -> float:
        """S, the mean over all entries: of equal matrices the mean of each one's.

        Raises:
            CalibrationError: none was measured.
        """
        return sum(s.sensitivity_by(rule) for s in self.statistics) / len(self.statistics)

    def cost(self, freeze_a: bool) -> int:
        """Trainable parameters that a rank costs: E m, and E d more where A trains."""
        return len(self.targets) * (self.d_out + (0 if freeze_a else self.d_in))


def grouped(targets: Sequence[Target], statistics: Sequence[ModuleStatistics]) -> list[Group]:
    """Return the adapters that the targets belong to, in order."""
    members: dict[str, list[tuple[Target, ModuleStatistics]]] = {}
    for pair in zip(targets, statistics, strict=True):
        members.setdefault(pair[0].adapter, []).append(pair)
    return [Group(name, *map(tuple, zip(*pairs, strict=True))) for name, pairs in members.items()]


def _ranks(groups: Sequence[Group], config: TLoraConfig) -> RankAllocation:
    limits = [min(g.d_in, g.d_out, config.rank_max or max(g.d_in, g.d_out)) for g in groups]
    bounds = [RankBounds(min(config.rank_min, high), high) for high in limits]
    rule, unit = config.sensitivity_rule, "ranks"
    weights = [group.sensitivity(rule) for group in groups if config.allocate_rank]
    if not config.allocate_rank:
        allocation = equal_ranks(config.r, bounds)
    elif config.budget == "params":
        costs = [group.cost(config.freeze_a) for group in groups]
        allocation = allocate_ranks_by_cost(weights, config.r, bounds, costs)
        unit = "parameters"
    else:
        allocation = allocate_ranks(weights, config.r, bounds)
    if not allocation.feasible:
        warnings.warn(
            f"{len(groups)} modules at r = {config.r} would have {allocation.wanted} {unit};"
            f" within rank_min = {config.rank_min}, rank_max = {config.rank_max} and the sizes of"
            f" the weights the nearest is {allocation.spent}, which the plan takes.",
            stacklevel=4,
        )
    return allocation


def _scales(groups: Sequence[Group], config: TLoraConfig) -> tuple[float, ...]:
    if not config.allocate_scale or config.scale_rule == "constant":
        return allocate_scales([1.0] * len(groups), config.r, config.lora_alpha, "constant")
    weights = [group.sensitivity(config.sensitivity_rule) for group in groups]
    return allocate_scales(weights, config.r, config.lora_alpha, config.scale_rule)
