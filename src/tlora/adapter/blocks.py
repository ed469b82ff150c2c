"""Planning without holding all second moments, within a memory budget.

One pass over the samples measures the sensitivities and keeps the second moments of as many
modules as the budget holds. Ranks and scales are settled, those modules are solved, their moments
freed; then a forward pass over the same samples, which stops after the last module it is for, does
the next block, until none is left: exact, and K blocks cost about K / 2 forward passes more than
one. A module whose own second moment exceeds the budget is solved by subspace iteration over the
samples instead, three forward passes and d x l memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tlora.adapter.module import ModulePlan
from tlora.adapter.plan import AdapterPlan, plan_info
from tlora.adapter.solve import allocate, solve, take_streamed
from tlora.calibration.bank import Accumulator, MomentBank, moment_bytes
from tlora.calibration.collector import Collector
from tlora.calibration.probe import checked_targets, first_pass, probing
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.streams import StreamBank, stream_bytes
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

    With moments in blocks the plan is the one that `calibrate` and `plan` give, to the bit.
    `covariance` says what happens to a module whose own moment exceeds the budget: "auto" streams
    it (whitening needs the moment itself, and so goes over budget instead), "exact" goes over
    budget, "streamed" streams every module.

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
    streamed = _streamed(targets, config)
    budget = config.memory_budget_bytes
    bank = MomentBank(budget, spared=streamed) if config.needs_moments else None
    with probing(model), torch.no_grad():
        with torch.enable_grad():
            first = first_pass(model, targets, batches, bank, config, progress=progress)
        planner = _Planner(model, targets, first, config, progress)
        kept = [t for t in targets if bank is None or bank.moment(t.name) is not None]
        planner.take(kept, bank)
        blocks: list[list[Target]] = []
        if bank is not None:
            done = {target.name for target in kept}
            blocks = _blocks([t for t in targets if t.name not in done | streamed], bank)
        bank = None  # frees the moments of this block before the next one is made
        for number, block in enumerate(blocks, start=2):
            planner.take(block, planner.moments(block, f"Block {number} of {len(blocks) + 1}"))
        streams = _stream_blocks([t for t in targets if t.name in streamed], planner, budget)
        for block in streams:
            planner.stream(block)
    info = plan_info(model, first.samples, planner.shares) | {"passes": planner.passes}
    return AdapterPlan({t.name: planner.done[t.name] for t in targets}, config, info)


class _Planner:
    """Makes module plans from passes over the samples that a first pass has read."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        first: Collector,
        config: TLoraConfig,
        progress: bool,
    ) -> None:
        self.model = model
        self.first = first
        self.config = config
        self.progress = progress
        self.statistics = {target.name: _statistics(target, first) for target in targets}
        self.shares = allocate(targets, list(self.statistics.values()), config)
        self.done: dict[str, ModulePlan] = {}
        self.passes = 1

    def take(self, block: Sequence[Target], bank: MomentBank | None) -> None:
        """Plan a block's modules from their second moments."""
        for target in block:
            moment = None if bank is None else bank.moment(target.name)
            measured = replace(self.statistics[target.name], moment=moment)
            self.done[target.name] = solve(
                target, measured, self.shares.of[target.name], self.config
            )

    def moments(self, block: list[Target], title: str) -> MomentBank:
        """Return a block's second moments, by a forward pass over the samples."""
        bank = MomentBank()
        self._pass(block, bank, title)
        return bank

    def stream(self, block: list[Target]) -> None:
        """Plan a block's modules by subspace iteration over the samples."""
        ranks = {target.name: self.shares.of[target.name].rank for target in block}
        bank = StreamBank(block, ranks, self.config.seed)
        while not bank.finished:
            self._pass(block, bank, "Streaming")
            bank.advance()
        for target in block:
            self.done[target.name] = take_streamed(
                target,
                self.statistics[target.name],
                self.shares.of[target.name],
                bank.result(target),
            )

    def _pass(self, block: list[Target], bank: Accumulator, title: str) -> None:
        from tqdm.auto import tqdm

        self.passes += 1
        collector = Collector(self.model, block, bank, backward=False)
        for unit in tqdm(self.first.units, desc=title, disable=None if self.progress else True):
            collector.add_again(unit)


def _streamed(targets: Sequence[Target], config: TLoraConfig) -> frozenset[str]:
    """Return the names of the modules whose second moments are not to be held."""
    budget = config.memory_budget_bytes
    if not config.needs_moments or config.covariance == "exact":
        return frozenset()
    if config.covariance == "streamed":
        return frozenset(target.name for target in targets)
    if budget is None or config.whiten:
        return frozenset()
    return frozenset(t.name for t in targets if moment_bytes(t.d_in) > budget)


def _stream_blocks(
    targets: Sequence[Target], planner: _Planner, budget: int | None
) -> list[list[Target]]:
    """Cut the streamed modules into runs whose blocks fit the budget; rank 0 needs none."""
    pieces = []
    for target in targets:
        share = planner.shares.of[target.name]
        if share.rank == 0:
            planner.take([target], None)
        else:
            pieces.append(([target], stream_bytes(target.d_in, share.rank)))
    return _packed(pieces, budget)


def _blocks(left: Sequence[Target], bank: MomentBank) -> list[list[Target]]:
    """Cut the targets into runs whose second moments fit the bank's budget.

    Modules that share their input share its moment, so a group is never cut.
    """
    groups: dict[int, list[Target]] = {}
    for target in left:
        groups.setdefault(bank.group_of[target.name], []).append(target)
    pieces = [(group, moment_bytes(group[0].d_in)) for group in groups.values()]
    return _packed(pieces, bank.budget)


def _packed(pieces: Sequence[tuple[list[Target], int]], budget: int | None) -> list[list[Target]]:
    """Join pieces of known bytes, in order, into runs within the budget (a piece at least)."""
    runs: list[list[Target]] = []
    room = 0
    for piece, size in pieces:
        if not runs or (budget is not None and size > room):
            runs.append([])
            room = budget or 0
        runs[-1] += piece
        room -= size
    return runs


def _statistics(target: Target, first: Collector) -> ModuleStatistics:
    return ModuleStatistics(
        name=target.name,
        d_in=target.d_in,
        d_out=target.d_out,
        samples=first.samples,
        sensitivity=first.sensitivity(target.name),
    )
