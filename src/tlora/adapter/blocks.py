"""Planning without holding all second moments, within a memory budget.

One pass over the samples measures the sensitivities and keeps the second moments of a first block
of modules. Ranks and scales are settled, those modules are solved, their moments freed; then a
forward pass over the same samples, which stops after the last module it is for, does the next
block, until none is left. A module whose own second moment exceeds the budget is solved by subspace
iteration over the samples instead. `strategy.py` says which module is done when.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tlora.adapter.experts import joined
from tlora.adapter.module import ModulePlan
from tlora.adapter.plan import AdapterPlan, plan_info
from tlora.adapter.solve import allocate, solve, take_streamed
from tlora.adapter.strategy import Strategy, choose, stream_runs
from tlora.calibration.bank import Accumulator, MomentBank
from tlora.calibration.batches import as_batch, batch_size
from tlora.calibration.collector import Collector
from tlora.calibration.faults import numbered, warn_of_skipped, within_memory
from tlora.calibration.offload import device_of
from tlora.calibration.probe import checked_targets, first_pass, probing, progress_bar
from tlora.calibration.sources import input_sources
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.streams import StreamBank
from tlora.calibration.targets import Target
from tlora.config import TLoraConfig

logger = logging.getLogger(__name__)


def plan_in_blocks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    *,
    progress: bool = True,
    skip_bad_samples: bool = False,
) -> AdapterPlan:
    """Calibrate and plan in one go, within `config.memory_budget` for the second moments.

    With moments in blocks the plan is the one that `calibrate` and `plan` give, to the bit.
    `covariance` says what happens to a module whose own moment exceeds the budget: "auto" streams
    it (whitening needs the moment itself, and so goes over budget instead), "exact" goes over
    budget, "streamed" streams every module. What is held and in how many passes is settled before
    anything is measured; where it takes more than one, it is logged.

    Args:
        model: as for `calibrate`.
        batches: as for `calibrate`; read once, so a generator will do.
        config: the adapter.
        progress: show bars (on a terminal only).
        skip_bad_samples: as for `calibrate`.

    Raises:
        CalibrationError: as `calibrate`.
        ConfigError: as `calibrate`.
    """
    targets = checked_targets(model, config)
    with probing(model), torch.no_grad():
        strategy, batches = _settle(model, targets, batches, config)
        if strategy.passes > 1:
            logger.info("%s", strategy.summary())
        bank = None
        blocks = [[t for t in targets if t.name in block] for block in map(set, strategy.blocks)]
        if config.needs_moments:
            kept = {target.name for block in blocks[:1] for target in block}
            bank = MomentBank(spared={t.name for t in targets} - kept)
        first = Collector(model, targets, bank, config.needs_sensitivity, skip_bad_samples)
        with torch.enable_grad(), progress_bar(batches, progress) as bar:
            first_pass(first, batches, config, bar)
        planner = _Planner(model, targets, first, config, progress)
        planner.take(blocks[0] if blocks else [t for t in targets if bank is None], bank)
        bank = None  # frees the moments of this block before the next one is made
        for number, block in enumerate(blocks[1:], start=2):
            planner.take(block, planner.moments(block, f"Block {number} of {len(blocks)}"))
        planner.stream([t for t in targets if t.name in strategy.streamed])
    warn_of_skipped(first.skipped, first.given, stacklevel=2)
    samples = (first.samples, len(first.skipped))
    info = plan_info(model, samples, planner.shares) | {"passes": planner.passes}
    return AdapterPlan(joined(targets, planner.done), config, info)


def _settle(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
) -> tuple[Strategy, Iterable[Mapping[str, Any]]]:
    """Choose the strategy; where moments have to share a budget, see first which are shared."""
    sources: dict[str, int] = {}
    if config.needs_moments and config.memory_budget is not None:
        batches = list(batches)
        if batches:
            batch = as_batch(batches[0], device_of(model))
            sources = within_memory(
                partial(input_sources, model, targets, batch),
                lambda: f"the forward pass of {numbered(0, batch_size(batch))}",
                batch_size(batch),
                config,
            )
    return choose(targets, sources, config), batches


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
            self.done[target.name] = within_memory(
                partial(solve, target, measured, self.shares.of[target.name], self.config),
                partial("solving {}".format, target.name),
                0,
                self.config,
            )

    def moments(self, block: list[Target], title: str) -> MomentBank:
        """Return a block's second moments, by a forward pass over the samples."""
        bank = MomentBank()
        self._pass(block, bank, title)
        return bank

    def stream(self, targets: Sequence[Target]) -> None:
        """Plan modules by subspace iteration over the samples, within the budget run by run."""
        ranks = {target.name: self.shares.of[target.name].rank for target in targets}
        # Rank 0 needs no subspace.
        self.take([target for target in targets if not ranks[target.name]], None)
        wanted = [(t, t.d_in, ranks[t.name]) for t in targets if ranks[t.name]]
        for run, _ in stream_runs(wanted, self.config.memory_budget_bytes):
            self._stream(run, ranks)

    def _stream(self, block: list[Target], ranks: Mapping[str, int]) -> None:
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
            size = len(unit.numbers)
            where = partial(collector.doing, unit.numbers[0], size)
            within_memory(partial(collector.add_again, unit), where, size, self.config)


def _statistics(target: Target, first: Collector) -> ModuleStatistics:
    return ModuleStatistics(
        name=target.name,
        d_in=target.d_in,
        d_out=target.d_out,
        samples=first.samples,
        sensitivity=first.sensitivity(target.name),
    )
