"""Statistics -> each module's share of the budget, and its frozen A."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
)
from tlora.linalg.subspace import (
    Solver,
    Subspace,
    captured_energy,
    random_basis,
    task_subspace,
    whitened,
)


@dataclass(frozen=True)
class Shares:
    """How the budget was shared out: by module name, and what of it was spent."""

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

    Raises:
        CalibrationError: ``config`` allocates, but sensitivities were not measured.
    """
    ranks = _ranks(targets, statistics, config)
    each = zip(targets, ranks.ranks, _scales(statistics, config), strict=True)
    of = {t.name: Share(index, rank, scale) for index, (t, rank, scale) in enumerate(each)}
    return Shares(of, ranks)


def solve(
    target: Target, statistics: ModuleStatistics, share: Share, config: TLoraConfig
) -> ModulePlan:
    """Find a module's A from its second moment.

    Raises:
        CalibrationError: ``config`` needs a second moment, but none was kept.
    """
    with torch.no_grad():
        basis, energy, solver = _basis(target, statistics, share, config)
    return _planned(target, statistics, share, basis, energy, solver)


def take_streamed(
    target: Target, statistics: ModuleStatistics, share: Share, found: Subspace
) -> ModulePlan:
    """Plan a module whose subspace was found without its second moment."""
    return _planned(target, statistics, share, found.basis, found.captured_energy, found.method)


def _planned(
    target: Target,
    statistics: ModuleStatistics,
    share: Share,
    basis: Tensor,
    energy: float | None,
    solver: str,
) -> ModulePlan:
    return ModulePlan(
        name=target.name,
        d_in=target.d_in,
        d_out=target.d_out,
        rank=share.rank,
        scale=share.scale,
        lora_A=basis.cpu(),
        captured_energy=energy,
        sensitivity=statistics.sensitivity,
        solver=solver,
    )


def _ranks(
    targets: Sequence[Target], statistics: Sequence[ModuleStatistics], config: TLoraConfig
) -> RankAllocation:
    limits = [min(t.d_in, t.d_out, config.rank_max or max(t.d_in, t.d_out)) for t in targets]
    bounds = [RankBounds(min(config.rank_min, high), high) for high in limits]
    weights = (
        [module.required_sensitivity for module in statistics]
        if config.allocate_rank
        else [1.0] * len(targets)
    )
    if config.budget == "params":
        costs = [t.d_out + (0 if config.freeze_a else t.d_in) for t in targets]
        allocation = allocate_ranks_by_cost(weights, config.r, bounds, costs)
        unit = "parameters"
    else:
        allocation = allocate_ranks(weights, config.r, bounds)
        unit = "ranks"
    if not allocation.feasible:
        warnings.warn(
            f"{len(targets)} modules at r = {config.r} would have {allocation.wanted} {unit};"
            f" within rank_min = {config.rank_min}, rank_max = {config.rank_max} and the sizes of"
            f" the weights the nearest is {allocation.spent}, which the plan takes.",
            stacklevel=4,
        )
    return allocation


def _scales(statistics: Sequence[ModuleStatistics], config: TLoraConfig) -> tuple[float, ...]:
    if not config.allocate_scale or config.scale_rule == "constant":
        return allocate_scales([1.0] * len(statistics), config.r, config.lora_alpha, "constant")
    weights = [module.required_sensitivity for module in statistics]
    return allocate_scales(weights, config.r, config.lora_alpha, config.scale_rule)


def _basis(
    target: Target, statistics: ModuleStatistics, share: Share, config: TLoraConfig
) -> tuple[Tensor, float | None, str]:
    """Return A (rank x d), the energy it captures, and how it was found."""
    rank = share.rank
    if rank == 0:
        return torch.zeros(0, target.d_in), 0.0, "none"
    if config.basis == "random":
        # A seed of its own for each module: equal shapes must not get equal matrices.
        basis = random_basis(rank, target.d_in, seed=config.seed * 1_000_003 + share.index)
        energy = None
        if statistics.moment is not None:
            weight = dense_weight(target)
            basis = basis.to(weight.device)
            energy = captured_energy(statistics.weighted(weight), basis)
        solver = "random"
    else:
        weight = dense_weight(target)
        solved = task_subspace(
            weight,
            statistics.weighted(weight),
            rank,
            Solver(mode=config.subspace, seed=config.seed),
        )
        basis, energy, solver = solved.basis, solved.captured_energy, solved.method
    if config.whiten:
        basis = whitened(basis, statistics.uncentred().to(basis))
    return basis, energy, solver
