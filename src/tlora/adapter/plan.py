"""The plan of an adapter: rank, scale and frozen subspace of every module. Pure data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tlora.adapter.experts import joined
from tlora.adapter.module import ModulePlan
from tlora.adapter.solve import Shares, allocate, solve
from tlora.adapter.spread import Job, solve_each
from tlora.calibration.cache import model_key
from tlora.calibration.cpu_kernels import refuse_repacked
from tlora.calibration.distributed import cohort
from tlora.calibration.sharding import class_name, reshard, resharded, unwrapped
from tlora.calibration.statistics import Calibration, ModuleStatistics
from tlora.calibration.targets import Target, find_targets
from tlora.config import TLoraConfig
from tlora.errors import AdapterError, PlanError
from tlora.files import file_at, read_tensors, write_tensors

_KIND = "plan"
_FORMAT = 1
_FILE = "plan.safetensors"


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
        return sum(m.parameters(self.config.freeze_a) for m in self.modules.values())

    def summary(self) -> str:
        """Return a few lines of text: modules, ranks, scales, parameters, captured energy."""
        modules = list(self.modules.values())
        ranks = [m.rank for m in modules]
        scales = [m.scale for m in modules]
        energies = [m.captured_energy for m in modules if m.captured_energy is not None]
        uniform = self.config.r * sum(m.experts * (m.d_out + m.d_in) for m in modules)
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
        path = file_at(path, _FILE)
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
        tensors, header = read_tensors(file_at(path, _FILE), _KIND, _FORMAT)
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

    In a process group every rank calls it with the statistics that `calibrate` gave it: the modules
    are shared out, and every rank ends with the same plan to the bit. Sharded weights (FSDP2,
    ZeRO-3) are gathered one module at a time.

    Args:
        model: the base model that was calibrated; DDP and DeepSpeed's engine are looked through.
        stats: from `calibrate`.
        config: how to share ranks and scales out, and which subspace.
        progress: show a bar (on a terminal only).

    Raises:
        PlanError: the statistics are not of this model.
        AdapterError: a weight cannot be read.
        CalibrationError: the statistics lack what ``config`` needs.

    Source: arXiv 2604.18124, section 3 (docs/method.md, 3 to 5).
    """
    ranks, model = cohort(), unwrapped(model)
    reshard(model)
    with resharded(model):
        with ranks.together():
            targets = find_targets(model, config)
            measured = [_statistics_of(target, stats) for target in targets]
            _refuse_another(model, stats)
            shares = allocate(targets, measured, config)
        # The first rank's, so that all have the same to the bit, whatever they were given.
        shares = ranks.send(shares, 0)
        each = zip(targets, measured, strict=True)
        solved = solve_each(
            [Job(target, module, shares.of[target.name]) for target, module in each],
            lambda job, weight: solve(job.target, job.statistics, job.share, config, weight),
            ranks,
            "Planning" if progress else None,
        )
    skipped = stats.info.get("skipped", 0)
    modules = joined(targets, solved)
    return AdapterPlan(modules, config, plan_info(model, (stats.samples, skipped), shares))


def _refuse_another(model: nn.Module, stats: Calibration) -> None:
    refuse_repacked(model, AdapterError)
    if stats.key is not None and stats.key.model != model_key(model):
        raise PlanError(
            f"the calibration is of another model ({stats.info.get('model', 'unknown class')}, with"
            f" other parameters than this {class_name(model)}), or of this one loaded another way"
            " (whole, offloaded or sharded); calibrate this model, loaded as it is now."
        )


def plan_info(model: nn.Module, samples: tuple[int, int], shares: Shares) -> dict[str, Any]:
    """Return where a plan comes from, as plain JSON values.

    Args:
        model: the base model.
        samples: how many counted, and how many were left out as bad.
        shares: of the budget.
    """
    return {
        "model": class_name(model),
        "samples": samples[0],
        "skipped": samples[1],
        "budget_wanted": shares.ranks.wanted,
        "budget_spent": shares.ranks.spent,
    }


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
