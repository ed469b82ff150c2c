"""The plan of an adapter: rank, scale and frozen subspace of every module. Pure data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.statistics import Calibration, ModuleStatistics
from tlora.calibration.targets import Target, find_targets
from tlora.calibration.weights import dense_weight
from tlora.config import TLoraConfig
from tlora.errors import PlanError
from tlora.files import read_tensors, write_tensors
from tlora.linalg.allocation import (
    RankAllocation,
    RankBounds,
    allocate_ranks,
    allocate_ranks_by_cost,
    allocate_scales,
)
from tlora.linalg.subspace import (
    Solver,
    captured_energy,
    random_basis,
    task_subspace,
    whitened,
)

_KIND = "plan"
_FORMAT = 1
_FILE = "plan.safetensors"


@dataclass
class ModulePlan:
    """The adapter of one module: y = W x + scale * B (lora_A x), B starting at zero.

    Attributes:
        name: the module's full name in the base model.
        d_in: d, columns of the weight.
        d_out: m, rows of the weight and of B.
        rank: r_i; 0 leaves the module out.
        scale: s_i.
        lora_A: r_i x d float32; orthonormal rows unless whitened or random.
        captured_energy: share of ||W C||_F^2 that the row space of lora_A keeps; None where no
            second moment was measured.
        sensitivity: S_i, or None where none was measured.
        solver: how the subspace was found: "exact", "randomized" or "random".
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    lora_A: Tensor
    captured_energy: float | None
    sensitivity: float | None
    solver: str


@dataclass
class AdapterPlan:
    """What to attach: one `ModulePlan` per targeted module, in model order, and the config."""

    modules: dict[str, ModulePlan]
    config: TLoraConfig
    info: dict[str, Any] = field(default_factory=dict)
    """Where the plan comes from (model class, calibration samples). Plain JSON values."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def trainable_parameters(self) -> int:
        """Adapter parameters that train: sum_i m_i r_i, plus sum_i d_i r_i where A trains too."""
        inputs = 0 if self.config.freeze_a else 1
        return sum(m.rank * (m.d_out + inputs * m.d_in) for m in self.modules.values())

    def summary(self) -> str:
        """Return a few lines of text: modules, ranks, scales, parameters, captured energy."""
        modules = list(self.modules.values())
        ranks = [m.rank for m in modules]
        scales = [m.scale for m in modules]
        energies = [m.captured_energy for m in modules if m.captured_energy is not None]
        uniform = self.config.r * sum(m.d_out + m.d_in for m in modules)
        lines = [
            f"{len(modules)} modules, {sum(ranks)} ranks ({min(ranks)} to {max(ranks)},"
            f" base {self.config.r})",
            f"scales {min(scales):.3g} to {max(scales):.3g}",
            f"{self.trainable_parameters:,} trainable parameters"
            f" ({self.trainable_parameters / uniform:.0%} of LoRA's {uniform:,})",
        ]
        if energies:
            mean = sum(energies) / len(energies)
            lines.append(
                f"captured energy {min(energies):.3f} to {max(energies):.3f}, {mean:.3f} mean"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (the A matrices, and a JSON header); return its path.

        Args:
            path: the file, or an existing folder that gets ``plan.safetensors``.
        """
        path = _file_of(path)
        rows = [
            {name: value for name, value in vars(module).items() if name != "lora_A"}
            for module in self.modules.values()
        ]
        header = {"kind": _KIND, "format": _FORMAT, "config": self.config.to_dict()}
        tensors = {name: module.lora_A for name, module in self.modules.items()}
        write_tensors(path, tensors, header | {"modules": rows, "info": self.info})
        return path

    @classmethod
    def load(cls, path: str | Path) -> AdapterPlan:
        """Read what `save` wrote; equal to what was saved, to the bit.

        Raises:
            ArtifactError: the file is missing, damaged or something else.
        """
        tensors, header = read_tensors(_file_of(path), _KIND)
        modules = {
            row["name"]: ModulePlan(**row, lora_A=tensors[row["name"]]) for row in header["modules"]
        }
        return cls(modules, TLoraConfig.from_dict(header["config"]), header["info"])


def plan(
    model: nn.Module, stats: Calibration, config: TLoraConfig, *, progress: bool = True
) -> AdapterPlan:
    """Decide every module's rank, scale and frozen A. The model is only read.

    The same statistics can be planned again with another rank, budget, basis or ablation, as
    long as they hold what it needs.

    Args:
        model: the base model that was calibrated.
        stats: from `calibrate`.
        config: how to share ranks and scales out, and which subspace.
        progress: show a bar (on a terminal only).

    Raises:
        PlanError: the statistics do not fit the model.
        CalibrationError: the statistics lack what ``config`` needs.

    Source: arXiv 2604.18124, section 3 (docs/method.md, 3 to 5).
    """
    from tqdm.auto import tqdm

    targets = find_targets(model, config)
    measured = [_statistics_of(target, stats) for target in targets]
    allocation = _ranks(targets, stats, config)
    scales = _scales(targets, stats, config)
    each = list(zip(targets, measured, allocation.ranks, scales, strict=True))
    modules = {}
    with torch.no_grad():
        disable = None if progress else True
        for index, (target, statistics, rank, scale) in enumerate(
            tqdm(each, desc="Planning", unit=" modules", disable=disable)
        ):
            basis, energy, solver = _basis(target, statistics, rank, config, index)
            modules[target.name] = ModulePlan(
                name=target.name,
                d_in=target.d_in,
                d_out=target.d_out,
                rank=rank,
                scale=scale,
                lora_A=basis.cpu(),
                captured_energy=energy,
                sensitivity=statistics.sensitivity,
                solver=solver,
            )
    info = {"model": type(model).__name__, "samples": stats.samples}
    info |= {"budget_wanted": allocation.wanted, "budget_spent": allocation.spent}
    return AdapterPlan(modules, config, info)


def _statistics_of(target: Target, stats: Calibration) -> ModuleStatistics:
    statistics = stats.modules.get(target.name)
    if statistics is None:
        raise PlanError(
            f"{target.name}: the calibration holds no statistics of it (it has"
            f" {len(stats)} modules); calibrate with the same model and `target_modules`."
        )
    if (statistics.d_in, statistics.d_out) != (target.d_in, target.d_out):
        raise PlanError(
            f"{target.name}: calibrated as {statistics.d_out} x {statistics.d_in}, but the model's"
            f" weight is {target.d_out} x {target.d_in}; calibrate this model."
        )
    return statistics


def _sensitivities(targets: list[Target], stats: Calibration) -> list[float]:
    wanted = {target.name for target in targets}
    kept = {name: module for name, module in stats.modules.items() if name in wanted}
    return Calibration(kept, stats.samples).sensitivities()


def _ranks(targets: list[Target], stats: Calibration, config: TLoraConfig) -> RankAllocation:
    limits = [min(t.d_in, t.d_out, config.rank_max or max(t.d_in, t.d_out)) for t in targets]
    bounds = [RankBounds(min(config.rank_min, high), high) for high in limits]
    weights = _sensitivities(targets, stats) if config.allocate_rank else [1.0] * len(targets)
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
            stacklevel=3,
        )
    return allocation


def _scales(targets: list[Target], stats: Calibration, config: TLoraConfig) -> tuple[float, ...]:
    if not config.allocate_scale or config.scale_rule == "constant":
        return allocate_scales([1.0] * len(targets), config.r, config.lora_alpha, "constant")
    weights = _sensitivities(targets, stats)
    return allocate_scales(weights, config.r, config.lora_alpha, config.scale_rule)


def _basis(
    target: Target, statistics: ModuleStatistics, rank: int, config: TLoraConfig, index: int
) -> tuple[Tensor, float | None, str]:
    """Return A (rank x d), the energy it captures, and how it was found."""
    if rank == 0:
        return torch.zeros(0, target.d_in), 0.0, "none"
    if config.basis == "random":
        # A seed of its own for each module: equal shapes must not get equal matrices.
        basis = random_basis(rank, target.d_in, seed=config.seed * 1_000_003 + index)
        energy = None
        if statistics.moment is not None:
            weight = dense_weight(target)
            basis = basis.to(weight.device)
            energy = captured_energy(weight @ statistics.covariance().to(weight), basis)
        solver = "random"
    else:
        weight = dense_weight(target)
        solved = task_subspace(
            weight,
            statistics.covariance().to(weight),
            rank,
            Solver(mode=config.subspace, seed=config.seed),
        )
        basis, energy, solver = solved.basis, solved.captured_energy, solved.method
    if config.whiten:
        basis = whitened(basis, statistics.uncentred().to(basis))
    return basis, energy, solver


def _file_of(path: str | Path) -> Path:
    path = Path(path)
    return path / _FILE if path.is_dir() else path
