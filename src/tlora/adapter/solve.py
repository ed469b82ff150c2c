"""Statistics and share -> the frozen A of a module.

A basis is one line in `MATRICES`, one in `tlora.config` (its name, and the statistics it needs).
Source: docs/method.md, 3 and 9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlora.adapter.plan import ModulePlan
from tlora.adapter.shares import Share
from tlora.calibration.module_statistics import ModuleStatistics
from tlora.calibration.weights import Target, dense_weight
from tlora.config import Basis, TLoraConfig
from tlora.linalg.bases import half_weighted, moment_itself
from tlora.linalg.matrices import FactoredMatrix, full_precision
from tlora.linalg.subspace import (
    Solver,
    Subspace,
    captured_energy,
    random_basis,
    task_subspace,
    whitened,
)

Matrix = Callable[[Tensor, ModuleStatistics], FactoredMatrix]
"""Takes W (m x d float32) and the module's statistics; gives a matrix of d columns on W's device.

Raises:
    CalibrationError: the calibration lacks what it is made from.
"""

MATRICES: dict[Basis, Matrix] = {
    "weight-covariance": lambda w, s: s.weighted(w),
    "covariance": lambda w, s: moment_itself(s.require_moment(), w),
    "weight-half-covariance": lambda w, s: half_weighted(w, s.require_moment()),
    "gradient": lambda w, s: FactoredMatrix(s.require_gradient().to(w)),
    "gradient-covariance": lambda w, s: s.weighted(s.require_gradient().to(w)),
    "gradient-moment": lambda w, s: moment_itself(s.require_gradient_moment(), w),
    "weight-gradient-moment": lambda w, s: s.require_gradient_moment().weighted(w),
}
"""By basis; one that is not here needs no matrix (random)."""

# By `TLoraConfig.whiten`: the power of K.
_WHITENING: dict[bool | str, float] = {True: -1 / 2, "half": -1 / 4}


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
        basis = whitened(found.basis, statistics.uncentered().to(found.basis), power)
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


def joined(targets: Sequence[Target], plans: Mapping[str, ModulePlan]) -> dict[str, ModulePlan]:
    """Return one plan for each adapter from those of its targets, by the adapter's name."""
    members: dict[str, list[ModulePlan]] = {}
    for target in targets:
        members.setdefault(target.adapter, []).append(plans[target.name])
    fused = {target.adapter for target in targets if target.part is not None}
    return {name: _join(name, each) if name in fused else each[0] for name, each in members.items()}


def _join(name: str, experts: Sequence[ModulePlan]) -> ModulePlan:
    sensitivities = [e.sensitivity for e in experts if e.sensitivity is not None]
    return replace(
        experts[0],
        name=name,
        lora_A=torch.cat([expert.lora_A for expert in experts]),
        captured_energy=_energy(experts),
        total_energy=_total(experts),
        sensitivity=sum(sensitivities) / len(sensitivities) if sensitivities else None,
        experts=len(experts),
    )


def _total(experts: Sequence[ModulePlan]) -> float | None:
    totals = [expert.total_energy for expert in experts]
    return sum(t for t in totals if t is not None) if None not in totals else None


def _energy(experts: Sequence[ModulePlan]) -> float | None:
    """Return the share of sum_e ||W_e C_e||_F^2 that is kept; 1 where it is zero."""
    kept = [e.captured_energy for e in experts]
    total = _total(experts)
    if total is None or None in kept:
        return None
    shares = [e.captured_energy * e.total_energy for e in experts]  # type: ignore[operator]
    return sum(shares) / total if total else 1.0
