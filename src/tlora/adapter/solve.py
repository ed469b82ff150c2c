"""Statistics -> rank, scale and frozen A of each module.

The budget is allocated by sensitivity, among adapters. PEFT adapts a fused parameter as a whole,
with one rank r and one scale for its E experts: lora_A has E r rows (expert e owns rows e r to (e +
1) r), lora_B has E r columns. Each expert gets its own r directions.

A basis is one line in `MATRICES` and one in `tlora.config` (its name, and the statistics it needs).
Source: docs/method.md, 3, 4, 5 and 9.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tlora.adapter.plan import ModulePlan
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.streams import given_or_read
from tlora.calibration.weights import Target, stored_weight
from tlora.config import Basis, TLoraConfig
from tlora.linalg.allocation import (
    RankAllocation,
    RankBounds,
    allocate_ranks,
    allocate_ranks_by_cost,
    allocate_scales,
    equal_ranks,
)
from tlora.linalg.bases import half_weighted, moment_itself
from tlora.linalg.matrices import FactoredMatrix, full_precision
from tlora.linalg.orthogonal import on_host, read
from tlora.linalg.singular import Solver
from tlora.linalg.subspace import (
    Problem,
    Subspace,
    energies,
    random_basis,
    share,
    task_subspaces,
    whitened,
)


@dataclass(frozen=True)
class Shares:
    """The allocation of the budget: the share of each target by name, and the amount spent."""

    of: dict[str, Share]
    ranks: RankAllocation


@dataclass(frozen=True)
class Share:
    """A module's share of the budget.

    Attributes:
        index: the module's position among the targets; seeds its random numbers.
        rank: r_i.
        scale: s_i.
    """

    index: int
    rank: int
    scale: float


def allocate(
    targets: Sequence[Target], statistics: Sequence[ModuleStatistics], config: TLoraConfig
) -> Shares:
    """Allocate ranks and scales by the modules' sensitivities; reads no second moments.

    The experts of a parameter count as one module and get the same rank and scale.

    Raises:
        CalibrationError: ``config`` allocates, but sensitivities were not measured.
    """
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.adapter, []).append(target)
    experts = list(groups.values())
    sensitivities = [1.0] * len(experts)
    if config.allocate_rank or (config.allocate_scale and config.scale_rule != "constant"):
        name = "sensitivity" if config.sensitivity_rule == "magnitude" else "fisher"
        by_name = {t.name: s for t, s in zip(targets, statistics, strict=True)}
        # The mean over all entries; for matrices of equal size, the mean of their means.
        sensitivities = [
            sum(by_name[t.name].require(name) for t in each) / len(each) for each in experts
        ]
    ranks = _ranks(experts, sensitivities, config)
    rule = config.scale_rule if config.allocate_scale else "constant"
    scales = allocate_scales(sensitivities, config.r, config.lora_alpha, rule)
    of: dict[str, Share] = {}
    for each, rank, scale in zip(experts, ranks.ranks, scales, strict=True):
        of |= {t.name: Share(len(of) + i, rank, scale) for i, t in enumerate(each)}
    return Shares(of, ranks)


def _ranks(
    experts: Sequence[Sequence[Target]], sensitivities: Sequence[float], config: TLoraConfig
) -> RankAllocation:
    shapes = [(each[0].d_out, each[0].d_in) for each in experts]
    limits = [min(*shape, config.rank_max or max(shape)) for shape in shapes]
    bounds = [RankBounds(min(config.rank_min, high), high) for high in limits]
    unit = "ranks"
    if not config.allocate_rank:
        allocation = equal_ranks(config.r, bounds)
    elif config.budget == "params":
        # Trainable parameters per rank: E m, plus E d if A trains.
        costs = [
            len(each) * (m + (0 if config.freeze_a else d))
            for each, (m, d) in zip(experts, shapes, strict=True)
        ]
        allocation = allocate_ranks_by_cost(sensitivities, config.r, bounds, costs)
        unit = "parameters"
    else:
        allocation = allocate_ranks(sensitivities, config.r, bounds)
    if not allocation.feasible:
        warnings.warn(_unlike_r(allocation, config, unit), stacklevel=4)
    return allocation


def _unlike_r(allocation: RankAllocation, config: TLoraConfig, unit: str) -> str:
    """Say why the plan has more or fewer ranks or parameters than r asks for."""
    total = f"{allocation.spent:,} {unit} in total, not {allocation.wanted:,}."
    if allocation.spent > allocation.wanted:
        return f"rank_min = {config.rank_min} is too large for r = {config.r}: the plan has {total}"
    if config.rank_max is not None and config.rank_max < config.r:
        return f"rank_max = {config.rank_max} is too small for r = {config.r}: the plan has {total}"
    return (
        f"r = {config.r} is larger than some weights allow; those layers get a smaller rank:"
        f" {total}"
    )


Matrix = Callable[[Tensor, ModuleStatistics], FactoredMatrix]
"""Maps W (m x d float32) and the module's statistics to a matrix with d columns on W's device.

Raises:
    CalibrationError: the calibration lacks the statistics for it.
"""

MATRICES: dict[Basis, Matrix] = {
    "weight-covariance": lambda w, s: s.weighted(w),
    "covariance": lambda w, s: moment_itself(s.require("moment"), w),
    "weight-half-covariance": lambda w, s: half_weighted(w, s.require("moment")),
    "gradient": lambda w, s: FactoredMatrix(s.require("gradient").to(w)),
    "gradient-covariance": lambda w, s: s.weighted(s.require("gradient").to(w)),
    "gradient-moment": lambda w, s: moment_itself(s.require("gradient_moment"), w),
    "weight-gradient-moment": lambda w, s: s.require("gradient_moment").weighted(w),
}
"""By basis; a basis without an entry needs no matrix (random)."""

# By `TLoraConfig.whiten`: the power of K.
_WHITENING: dict[bool | str, float] = {True: -1 / 2, "half": -1 / 4}


@dataclass(frozen=True)
class ModuleJob:
    """A module to plan: its statistics and its share of the budget."""

    target: Target
    statistics: ModuleStatistics
    share: Share


@full_precision
def solve(
    jobs: Sequence[ModuleJob], config: TLoraConfig, weight: Tensor | None = None
) -> list[ModulePlan]:
    """Compute modules' A from their statistics, synchronizing once for all.

    Args:
        jobs: the modules.
        config: which subspace.
        weight: W, m x d float32, of a single module, if available; None: each weight is read when
            needed.
    """
    with torch.no_grad():
        wanted = [job for job in jobs if job.share.rank]
        if config.basis in MATRICES:
            solver = Solver(mode=config.subspace, seed=config.seed)
            found = task_subspaces([_problem(job, config, weight) for job in wanted], solver)
        else:
            found = _random(wanted, config, weight)
        if config.whiten:
            power = _WHITENING[config.whiten]
            found = [_whitened(*pair, power) for pair in zip(wanted, found, strict=True)]
    of = {job.target.name: each for job, each in zip(wanted, found, strict=True)}
    return planned(jobs, config, [of.get(job.target.name) or _empty_subspace(job) for job in jobs])


def _problem(job: ModuleJob, config: TLoraConfig, weight: Tensor | None) -> Problem:
    target = job.target
    read = partial(given_or_read, weight, target)
    narrow = weight is None and config.basis == "weight-covariance"
    factor = partial(_narrow_or_float32, target) if narrow else read
    matrix = MATRICES[config.basis]
    return Problem(
        lambda: matrix(factor(), job.statistics), read, (target.d_out, target.d_in), job.share.rank
    )


def _narrow_or_float32(target: Target) -> Tensor:
    """Return W as `SecondMoment.weighted` takes it: 16-bit weights unchanged, others in float32."""
    weight = stored_weight(target)
    return weight if weight.itemsize == 2 else weight.float()


def _whitened(job: ModuleJob, found: Subspace, power: float) -> Subspace:
    uncentered = job.statistics.uncentered().to(found.basis)
    return replace(found, basis=whitened(found.basis, uncentered, power))


def _empty_subspace(job: ModuleJob) -> Subspace:
    return Subspace(torch.zeros(0, job.target.d_in), 0.0, "none", 0, None)


def planned(
    jobs: Sequence[ModuleJob], config: TLoraConfig, found: Sequence[Subspace]
) -> list[ModulePlan]:
    """Return the plans of modules with the subspaces ``found``."""
    rows = on_host([each.basis for each in found])
    return [
        ModulePlan(
            name=job.target.name,
            d_in=job.target.d_in,
            d_out=job.target.d_out,
            rank=job.share.rank,
            scale=job.share.scale,
            lora_A=a,
            captured_energy=each.captured_energy,
            sensitivity=job.statistics.measured(config.sensitivity_rule),
            solver=each.method,
            total_energy=each.total_energy,
        )
        for job, each, a in zip(jobs, found, rows, strict=True)
    ]


def _random(
    jobs: Sequence[ModuleJob], config: TLoraConfig, weight: Tensor | None
) -> list[Subspace]:
    """Draw A at random; its captured energy of W C is known if a second moment was measured."""
    found: list[Subspace] = []
    measured: dict[int, Tensor] = {}
    for place, job in enumerate(jobs):
        # A separate seed per module: equal shapes must not get equal matrices.
        seed = config.seed * 1_000_003 + job.share.index
        basis = random_basis(job.share.rank, job.target.d_in, seed)
        if job.statistics.moment is not None:
            dense = given_or_read(weight, job.target)
            measured[place] = energies(job.statistics.weighted(dense), basis.to(dense.device))
        found.append(Subspace(basis, None, "random", 0, None))
    for place, (kept, whole) in zip(measured, read(list(measured.values())), strict=True):
        energy = share(kept, whole)
        found[place] = replace(found[place], captured_energy=energy, total_energy=whole)
    return found


def joined(targets: Sequence[Target], plans: Mapping[str, ModulePlan]) -> dict[str, ModulePlan]:
    """Return one plan per adapter from the plans of its targets, by the adapter's name."""
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
    """Return the captured share of sum_e ||W_e C_e||_F^2; 1 if the sum is zero."""
    kept = [e.captured_energy for e in experts]
    total = _total(experts)
    if total is None or None in kept:
        return None
    shares = [e.captured_energy * e.total_energy for e in experts]  # type: ignore[operator]
    return sum(shares) / total if total else 1.0
