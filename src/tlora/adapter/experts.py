"""Experts of one parameter, planned each and adapted as one.

PEFT adapts a fused parameter as a whole: one rank r and one scale for its E experts, lora_A with
E r rows (expert e owns rows e r to (e + 1) r), lora_B with E r columns. So the budget is shared out
among adapters, not among experts; each expert then gets r directions of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tlora.adapter.module import ModulePlan
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.targets import Target
from tlora.config import SensitivityRule


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
