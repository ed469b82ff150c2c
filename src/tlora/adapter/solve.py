"""Statistics -> each module's share of the budget, and its frozen A."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlora.adapter.bases import MATRICES
from tlora.adapter.experts import Group, grouped
from tlora.adapter.module import ModulePlan
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.targets import Target
from tlora.calibration.weights import dense_weight
from tlora.config import TLoraConfig
from tlora.linalg.allocation import (
    RankAllocation,
    RankBounds,
    allocate_ranks,
    allocate_ranks_by_cost,
    allocate_scales,
    equal_ranks,
)
from tlora.linalg.precision import full_precision
from tlora.linalg.subspace import (
    Solver,
    Subspace,
    captured_energy,
    random_basis,
    task_subspace,
    whitened,
)

# By `TLoraConfig.whiten`: the power of K.
_WHITENING: dict[bool | str, float] = {True: -1 / 2, "half": -1 / 4}


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


@full_precision
def solve(
    target: Target,
    statistics: ModuleStatistics,
    share: Share,
    config: TLoraConfig,
    weight: Tensor | None = None,
) -> ModulePlan:
    """Find a module's A from its statistics.

    Args:
        target: the module.
        statistics: what was measured of it.
        share: what it gets of the budget.
        config: which subspace.
        weight: W, m x d float32, if it is at hand; None: it is read where it is needed.

    Raises:
        CalibrationError: ``config`` needs a second moment or gradient, but none was kept.
    """
    with torch.no_grad():
        found = _basis(target, statistics, share, config, weight)
    return _planned(target, statistics.measured(config.sensitivity_rule), share, found)


def take_streamed(
    target: Target,
    statistics: ModuleStatistics,
    share: Share,
    config: TLoraConfig,
    found: Subspace,
) -> ModulePlan:
    """Plan a module whose subspace was found without its second moment."""
    sensitivity = statistics.measured(config.sensitivity_rule)
    return _planned(target, sensitivity, share, _Found.of(found))


@dataclass(frozen=True)
class _Found:
    """A (rank x d), the share of ||M||_F^2 that it captures, all of it, how it was found.

    M is the matrix of the basis (`MATRICES`), W C of a random one.
    """

    basis: Tensor
    energy: float | None
    total: float | None
    solver: str

    @classmethod
    def of(cls, space: Subspace) -> _Found:
        return cls(space.basis, space.captured_energy, space.total_energy, space.method)


def _planned(target: Target, sensitivity: float | None, share: Share, found: _Found) -> ModulePlan:
    return ModulePlan(
        name=target.name,
        d_in=target.d_in,
        d_out=target.d_out,
        rank=share.rank,
        scale=share.scale,
        lora_A=found.basis.cpu(),
        captured_energy=found.energy,
        sensitivity=sensitivity,
        solver=found.solver,
        total_energy=found.total,
    )


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


def _basis(
    target: Target,
    statistics: ModuleStatistics,
    share: Share,
    config: TLoraConfig,
    weight: Tensor | None,
) -> _Found:
    rank = share.rank
    if rank == 0:
        return _Found(torch.zeros(0, target.d_in), 0.0, None, "none")
    matrix = MATRICES.get(config.basis)
    if matrix is None:
        found = _random_basis(target, statistics, share, config, weight)
    else:
        weight = dense_weight(target) if weight is None else weight
        solver = Solver(mode=config.subspace, seed=config.seed)
        found = _Found.of(task_subspace(weight, matrix(weight, statistics), rank, solver))
    if config.whiten:
        power = _WHITENING[config.whiten]
        basis = whitened(found.basis, statistics.uncentred().to(found.basis), power)
        found = replace(found, basis=basis)
    return found


def _random_basis(
    target: Target,
    statistics: ModuleStatistics,
    share: Share,
    config: TLoraConfig,
    weight: Tensor | None,
) -> _Found:
    # A seed of its own for each module: equal shapes must not get equal matrices.
    basis = random_basis(share.rank, target.d_in, seed=config.seed * 1_000_003 + share.index)
    if statistics.moment is None:
        return _Found(basis, None, None, "random")
    weight = dense_weight(target) if weight is None else weight
    product = statistics.weighted(weight)
    basis = basis.to(weight.device)
    energy = captured_energy(product, basis)
    return _Found(basis, energy, product.energy().item(), "random")
