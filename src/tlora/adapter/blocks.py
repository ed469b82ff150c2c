"""Calibrates and plans in one go, within a memory budget for second moments and gradients.

One pass over the samples measures the sensitivities and keeps the second moments of a first block
of modules. Ranks and scales are computed, those modules are solved, and their moments are freed. A
forward pass over the same samples, which stops after the last module it needs, then handles the
next block, until none is left (a gradient basis needs a whole forward and backward pass). Without a
budget the first block holds all modules. A module whose own second moment exceeds the budget, or
that is cheaper to stream, is solved by subspace iteration over the samples. `strategy.py` decides
the order.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tlora.adapter.costs import work_of
from tlora.adapter.plan import AdapterPlan, ModulePlan
from tlora.adapter.planning import Solve, plan_info, solve_each
from tlora.adapter.solve import ModuleJob, allocate, joined, planned, solve
from tlora.adapter.strategy import Strategy, choose, stream_runs
from tlora.calibration.accumulators import (
    Accumulator,
    GradientAccumulator,
    MomentAccumulator,
    cheaper_by_outputs,
)
from tlora.calibration.backward import Backward, backward_again, backward_for
from tlora.calibration.batches import (
    as_batch,
    batch_size,
    numbered,
    real_tokens,
    token_layout,
)
from tlora.calibration.budget import MemoryBudget, resolved
from tlora.calibration.collector import Collector, forward_options
from tlora.calibration.group import Lockstep, ProcessGroup
from tlora.calibration.hooks import ModuleRecord, recording
from tlora.calibration.probe import (
    CalibrateOptions,
    begin,
    checked_batch,
    first_pass,
    probing,
    progress_bar,
    warn_of_skipped,
    within_memory,
)
from tlora.calibration.streams import StreamAccumulator
from tlora.calibration.weights import Target
from tlora.config import TLoraConfig

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

logger = logging.getLogger(__name__)


def plan_in_blocks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    **reading: Unpack[CalibrateOptions],
) -> AdapterPlan:
    """Calibrate and plan in one go, within `config.memory_budget` for moments and gradients.

    With exact moments, at once or in blocks, the plan has the same bits, and equals that of
    `calibrate` and `plan` up to the rounding of modules whose W C is computed from their outputs
    (`cheaper_by_outputs`).
    `covariance` decides how to keep the budget: "auto" streams modules where that is cheaper,
    and any module whose own moment exceeds the budget (whitening and other bases need the moment
    itself, and exceed the budget instead); "exact" exceeds the budget; "streamed" streams every
    module. The budget and the modules of each pass are settled first, and recorded in the plan's
    ``info["calibration"]``.

    Args:
        model: as for `calibrate`.
        batches: as for `calibrate`; read once, so a generator works.
        config: the adapter's configuration.
        **reading: as for `calibrate`, except ``cache``: no calibration is kept.

    Raises:
        CalibrationError: as `calibrate`.
        ConfigError: no module matches ``target_modules``.
    """
    progress = reading.get("progress", True)
    group, model, targets = begin(model, config)
    budget = resolved(config, model, targets, group)
    settling = _Settling(targets, config, budget, Lockstep(model, group), group)
    with probing(model), torch.no_grad():
        strategy, batches = settling.strategy(batches)
        blocks = [[t for t in targets if t.name in block] for block in map(set, strategy.blocks)]
        kept = {target.name for block in blocks[:1] for target in block}
        accumulator = settling.accumulator({target.name for target in targets} - kept)
        asked, skips = backward_for(config, kept), reading.get("skip_bad_samples", False)
        first = Collector(model, targets, accumulator, asked, skips, group)
        first.keep_micro_batches = strategy.passes > 1
        with torch.enable_grad(), progress_bar(batches, progress and group.is_main_process) as bar:
            first_pass(first, batches, budget, bar)
        planner = _Planner(first, settling, strategy, progress)
        begun = blocks[0] if blocks else [t for t in targets if accumulator is None]
        planner.take(begun, accumulator, first.gradients)
        # Frees the moments of this block before the next one is made.
        accumulator = first.accumulator = None
        planner.take_rest(blocks)
        planner.stream([t for t in targets if t.name in strategy.streamed])
    warn_of_skipped(first.skipped if group.is_main_process else {}, first.given, stacklevel=2)
    return planner.plan()


@dataclass(frozen=True)
class _Settling:
    """Everything known before measuring.

    Attributes:
        targets: the modules.
        config: as given by the user.
        budget: resolved.
        lockstep: runs the batch that shows which modules share an input.
        group: the processes that divide the samples.
    """

    targets: Sequence[Target]
    config: TLoraConfig
    budget: MemoryBudget
    lockstep: Lockstep
    group: ProcessGroup

    def strategy(
        self, batches: Iterable[Mapping[str, Any]]
    ) -> tuple[Strategy, Iterable[Mapping[str, Any]]]:
        """Choose the strategy; if a budget applies, first find out which modules share moments.

        Returns:
            The strategy and the batches, of which some may have been read.
        """
        sources: dict[str, int] = {}
        work = None
        if self.config.needs_moments and self.budget.bytes is not None:
            with self.group.raise_on_all():
                batches = list(batches)
                tokens = sum(map(real_tokens, batches))
            sources = self._sources(batches)
            tokens = sum(self.group.all_gather(tokens))
            work = work_of(self.lockstep.model, self.targets, self.config, tokens)
        config = replace(self.config, memory_budget=self.budget.bytes)
        first = self.budget.first if config.needs_backward else None
        strategy = choose(self.targets, sources, config, work, first)
        if self.group.is_main_process and (strategy.passes > 1 or self.budget.bytes is not None):
            logger.info("%s; `memory_budget`: %s", strategy.summary(), self.budget.explained())
        return strategy, batches

    def accumulator(self, excluded: Collection[str] = ()) -> MomentAccumulator | None:
        """Return the accumulator of a pass's moments, without excluded modules; None if empty."""
        if not self.config.needs_moments:
            return None
        # Processes can only sum second moments.
        alone = self.group.size == 1
        by_outputs = cheaper_by_outputs(self.targets, self.config) if alone else ()
        return MomentAccumulator(excluded, by_outputs)

    def _sources(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        with self.group.raise_on_all():
            own = as_batch(batches[0], torch.device("cpu")) if batches else None
        # All processes run the same batch, and one of them reports the result.
        if (lent := self.group.broadcast_first(own)) is None:
            return {}
        model = self.lockstep.model
        with self.group.raise_on_all(), self.lockstep.group.inside_collectives():
            batch = checked_batch(model, lent)
            sources = within_memory(
                partial(input_sources, model, self.targets, batch),
                lambda: f"the forward pass of {numbered(0, batch_size(batch))}",
                batch_size(batch),
                self.budget,
            )
        found: dict[str, int] = self.group.broadcast(sources, 0)
        return found


class _Planner:
    """Makes module plans from passes over the samples that the first pass has read."""

    def __init__(
        self,
        first: Collector,
        settled: _Settling,
        strategy: Strategy,
        progress: bool,
    ) -> None:
        self.first = first
        self.settled = settled
        self.targets = targets = settled.targets
        self.strategy = strategy
        self.group = first.group
        self.config = settled.config
        self.budget = settled.budget
        self.progress = progress
        self.statistics = {target.name: first.measured(target) for target in targets}
        shares = allocate(targets, list(self.statistics.values()), self.config)
        self.shares = self.group.broadcast(shares, 0)
        self.done: dict[str, ModulePlan] = {}
        self.passes = 1

    def take(
        self,
        block: Sequence[Target],
        accumulator: MomentAccumulator | None,
        gradients: GradientAccumulator | None = None,
    ) -> None:
        """Plan a block's modules from their second moments, and gradients."""
        self._solve(
            [self._job(target, accumulator, gradients) for target in block],
            lambda jobs, weight: solve(jobs, self.config, weight),
        )

    def plan(self) -> AdapterPlan:
        """Return the plan of all modules, once each is solved."""
        samples, strategy = (self.first.samples, len(self.first.skipped)), self.strategy
        info = plan_info(self.first.model, samples, self.shares) | {"passes": self.passes}
        info["calibration"] = {
            "memory_budget": self.budget.bytes,
            "memory_budget_from": self.budget.source or "the configuration",
            "strategy": strategy.summary(),
            "blocks": len(strategy.blocks),
            "streamed": len(strategy.streamed),
            "passes": self.passes,
            "held": strategy.held,
        }
        return AdapterPlan(joined(self.targets, self.done), self.config, info)

    def take_rest(self, blocks: Sequence[list[Target]]) -> None:
        """Plan the blocks after the first, each from a pass over the samples."""
        for number, block in enumerate(blocks[1:], start=2):
            accumulator = self.settled.accumulator()
            backward = backward_again(self.config)
            self._pass(block, accumulator, f"Block {number} of {len(blocks)}", backward)
            self.take(block, accumulator, None if backward is None else backward.accumulator)

    def stream(self, targets: Sequence[Target]) -> None:
        """Plan modules by subspace iteration over the samples, run by run within the budget."""
        ranks = {target.name: self.shares.of[target.name].rank for target in targets}
        # Rank 0 needs no subspace.
        self.take([target for target in targets if not ranks[target.name]], None)
        wanted = [(t, t.d_in, ranks[t.name]) for t in targets if ranks[t.name]]
        for run, _ in stream_runs(wanted, self.budget.bytes):
            self._stream(run, ranks)

    def _stream(self, block: list[Target], ranks: Mapping[str, int]) -> None:
        accumulator = StreamAccumulator(block, ranks, self.config.seed)
        while not accumulator.finished:
            self._pass(block, accumulator, "Streaming")
            accumulator.advance(self.group)
        self._solve(
            [self._job(target) for target in block],
            lambda jobs, weight: planned(
                jobs, self.config, accumulator.results([job.target for job in jobs], weight)
            ),
        )

    def _job(
        self,
        target: Target,
        accumulator: MomentAccumulator | None = None,
        gradients: GradientAccumulator | None = None,
    ) -> ModuleJob:
        moment = None if accumulator is None else accumulator.moment(target.name)
        measured = replace(self.statistics[target.name], moment=moment)
        if gradients is not None:
            gradients.give(target, measured)
        return ModuleJob(target, measured, self.shares.of[target.name])

    def _solve(self, jobs: Sequence[ModuleJob], solve_some: Solve) -> None:
        def within(some: Sequence[ModuleJob], weight: Tensor | None) -> list[ModulePlan]:
            more = f" and {len(some) - 1} more" if some[1:] else ""
            where = partial("solving {}{}".format, some[0].target.name, more)
            return within_memory(partial(solve_some, some, weight), where, 0, self.budget)

        # If passes follow, their progress bars are enough.
        title = "Planning" if self.progress and self.strategy.passes == 1 else None
        self.done |= solve_each(jobs, within, self.group, title)

    def _pass(
        self,
        block: list[Target],
        accumulator: Accumulator | None,
        title: str,
        backward: Backward | None = None,
    ) -> None:
        from tqdm.auto import tqdm

        self.passes += 1
        collector = Collector(self.first.model, block, accumulator, backward, group=self.group)
        hidden = None if self.progress and self.group.is_main_process else True
        with self.group.raise_on_all(), torch.set_grad_enabled(backward is not None):
            for micro_batch in tqdm(self.first.micro_batches, desc=title, disable=hidden):
                size = len(micro_batch.numbers)
                where = partial(collector.doing, micro_batch.numbers[0], size)
                within_memory(partial(collector.add_again, micro_batch), where, size, self.budget)
            collector.run_spare_passes()
        collector.pool()


def input_sources(
    model: nn.Module, targets: Sequence[Target], batch: dict[str, Any]
) -> dict[str, int]:
    """Return a number for each target that runs, equal for targets that read the same tensors.

    The model is in eval mode, its parameters frozen (see `preserved`), the batch on its device.
    """
    # Experts in fused parameters share no rows.
    records = {target.name: ModuleRecord(target) for target in targets if target.part is None}
    layout = token_layout(batch, model)
    with recording(model, records.values(), layout, backward=False), torch.no_grad():
        model(**batch, **forward_options(model, batch))
    numbers: dict[tuple[Any, ...], int] = {}
    return {
        name: numbers.setdefault(record.source, len(numbers))
        for name, record in records.items()
        if record.calls
    }
