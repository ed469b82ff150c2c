"""Planning without holding all second moments: exact, in blocks that fit a memory budget.

One pass over the samples measures the sensitivities and keeps the second moments of as many
modules as the budget holds. Ranks and scales are settled, those modules are solved, their moments
freed; then a forward pass over the same samples, which stops after the last module it is for, does
the next block, until none is left. K blocks cost about K / 2 forward passes more than one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tlora.adapter.module import ModulePlan
from tlora.adapter.plan import AdapterPlan, plan_info
from tlora.adapter.solve import allocate, solve
from tlora.calibration.bank import MomentBank, moment_bytes
from tlora.calibration.collector import Collector
from tlora.calibration.probe import checked_targets, first_pass, probing
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.targets import Target
from tlora.config import TLoraConfig


def plan_in_blocks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    *,
    progress: bool = True,
) -> AdapterPlan:
    """Calibrate and plan in one go, within `config.memory_budget` for the second moments.

    The plan is the one that `calibrate` and `plan` give, to the bit. A module whose own moment
    exceeds the budget is done alone, over budget.

    Args:
        model: as for `calibrate`.
        batches: as for `calibrate`; read once, so a generator will do.
        config: the adapter.
        progress: show bars (on a terminal only).

    Raises:
        CalibrationError: as `calibrate`.
        ConfigError: as `calibrate`.
    """
    targets = checked_targets(model, config)
    bank = MomentBank(config.memory_budget_bytes) if config.needs_moments else None
    with probing(model):
        first = first_pass(model, targets, batches, bank, config, progress=progress)
        statistics = {target.name: _statistics(target, first) for target in targets}
        shares = allocate(targets, list(statistics.values()), config)

        def solved(target: Target, bank: MomentBank | None) -> ModulePlan:
            moment = None if bank is None else bank.moment(target.name)
            measured = replace(statistics[target.name], moment=moment)
            return solve(target, measured, shares[target.name], config)

        left = [t for t in targets if bank is not None and bank.moment(t.name) is None]
        blocks = [] if bank is None else _blocks(left, bank)
        done = {t.name: solved(t, bank) for t in targets if t not in left}
        bank = None  # frees the moments of this block before the next one is made
        for number, block in enumerate(blocks, start=2):
            title = f"Block {number} of {len(blocks) + 1}"
            made = _moments(model, block, first, title=title, progress=progress)
            done |= {target.name: solved(target, made) for target in block}
            del made
    modules = {target.name: done[target.name] for target in targets}
    info = plan_info(model, first.samples) | {"blocks": len(blocks) + 1}
    return AdapterPlan(modules, config, info)


def _blocks(left: Sequence[Target], bank: MomentBank) -> list[list[Target]]:
    """Cut the targets into runs, in order, whose moments fit the bank's budget (a group at least).

    Modules that share their input share its moment, so a group is never cut.
    """
    groups: dict[int, list[Target]] = {}
    for target in left:
        groups.setdefault(bank.group_of[target.name], []).append(target)
    blocks: list[list[Target]] = []
    room = 0
    for group in groups.values():
        size = moment_bytes(group[0].d_in)
        if not blocks or (bank.budget is not None and size > room):
            blocks.append([])
            room = bank.budget or 0
        blocks[-1] += group
        room -= size
    return blocks


def _moments(
    model: nn.Module, block: list[Target], first: Collector, *, title: str, progress: bool
) -> MomentBank:
    """Return the moments of a block's targets, by a forward pass over what ``first`` has read."""
    from tqdm.auto import tqdm

    bank = MomentBank()
    collector = Collector(model, block, bank, backward=False)
    for unit in tqdm(first.units, desc=title, disable=None if progress else True):
        collector.add_again(unit)
    return bank


def _statistics(target: Target, first: Collector) -> ModuleStatistics:
    return ModuleStatistics(
        name=target.name,
        d_in=target.d_in,
        d_out=target.d_out,
        samples=first.samples,
        sensitivity=first.sensitivity(target.name),
    )
