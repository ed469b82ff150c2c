"""`calibrate`: a few samples of the task through the model, and what was seen of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration import batches as reading
from tlora.calibration.bank import MomentBank
from tlora.calibration.collector import Collector
from tlora.calibration.distributed import Cohort, cohort
from tlora.calibration.expert_targets import warn_of_unadapted_experts
from tlora.calibration.faults import (
    refuse_none_left,
    warn_of_skipped,
    warn_of_unreached,
    within_memory,
)
from tlora.calibration.gradients import backward_for
from tlora.calibration.identity import Key
from tlora.calibration.journal import Journal
from tlora.calibration.offload import can_be_loaded, device_of, loaded_by
from tlora.calibration.preserve import preserved, random_states_kept
from tlora.calibration.sharding import class_name, refuse_unread, reshard, resharded, unwrapped
from tlora.calibration.spill import Spill, spill_budget
from tlora.calibration.statistics import Calibration
from tlora.calibration.targets import Target, find_targets, warn_of_second_names, warn_of_unmatched
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    *,
    progress: bool = True,
    skip_bad_samples: bool = False,
    cache: str | Path | None = None,
) -> Calibration:
    """Measure the statistics that ``plan`` needs, on a few samples of the task.

    The model comes back as it was (parameters, ``requires_grad``, ``.grad``, modes, hooks, random
    states), also when a batch raises. Dropout is off while it runs. Second moments and gradients
    beyond ``config.memory_budget`` (all, if ``covariance`` is "streamed") are kept in memory-mapped
    files, beside the cache or in the folder for temporary files.

    In a process group every rank gives its share of the batches (any number, or none) and gets
    all samples' statistics, up to rounding; all batches on every rank give the same. What one rank
    raises is raised on all, with the rank's number.

    Args:
        model: the base model, weights loaded, no adapters; DDP, FSDP2 and DeepSpeed's engine may
            hold it (docs/distributed.md).
        batches: dicts of what its forward takes; a DataLoader works as it is. A batch of B padded
            samples gives what B batches of one give. Labels are needed where ranks or scales are
            allocated, or `basis` needs gradients; with the prompt masked as in training.
        config: which modules, and which statistics.
        progress: show a bar with samples and time left (on a terminal only).
        skip_bad_samples: leave out samples without a label that counts, or whose activations, loss
            or gradient are not finite, as if they had not been given; one warning names them.
        cache: a file. If it holds the calibration of this model, these batches and modules, it is
            loaded and nothing runs; else it is written, and progress on the way, from which a
            killed run goes on to the same statistics, to the bit.

    Raises:
        CalibrationError: no samples; a bad sample (it is named, and the module), or none that is
            good; no loss; a model on ``meta``; memory ran out; ``cache`` is another calibration.
        ArtifactError: ``cache`` is damaged, or something else.
        ConfigError: no module matches ``target_modules``.
    """
    ranks, model, targets = begin(model, config)
    with ranks.together():
        journal = Journal(model, targets, config, cache, skip_bad_samples, ranks)
    with random_states_kept():  # a DataLoader draws some to be looked through
        stats = journal.found(batches)
    if stats is None:
        stats = _measured(model, targets, batches, journal, config, progress)
    skipped = stats.info.get("skipped_samples", {}) if ranks.leads else {}
    warn_of_skipped(skipped, stats.samples + len(skipped), stacklevel=2)
    return stats


def _measured(
    model: nn.Module,
    targets: list[Target],
    batches: Iterable[Mapping[str, Any]],
    journal: Journal,
    config: TLoraConfig,
    progress: bool,
) -> Calibration:
    spill, ranks = _spill(config, journal.path), journal.ranks
    bank = MomentBank(spill=spill) if config.needs_moments else None
    asked = backward_for(config, spill=spill)
    reads = Collector(model, targets, bank, asked, journal.skip_bad_samples, ranks)
    with probing(model), progress_bar(batches, progress and ranks.leads) as bar:
        first_pass(reads, journal.left(batches, reads, bank), config, bar)
    stats = _calibration(reads, bank, journal.pooled_key(), config)
    journal.finish(stats)
    return stats


def _spill(config: TLoraConfig, cache: Path | None) -> Spill | None:
    """Return where moments go; None: all into memory."""
    budget = spill_budget(config)
    folder = Path(tempfile.gettempdir()) if cache is None else cache.parent
    return None if budget is None else Spill(budget, folder)


def _calibration(
    collector: Collector, bank: MomentBank | None, key: Key, config: TLoraConfig
) -> Calibration:
    modules = {}
    for target in collector.targets:
        module = modules[target.name] = collector.measured(target)
        if bank is not None:
            module.moment = bank.moment(target.name)
            module.moment_id = bank.group_of[target.name]
        if collector.gradients is not None:
            collector.gradients.give(target, module)
    info = {
        "model": class_name(collector.model),
        "config": config.to_dict(),
        "skipped": len(collector.skipped),
        "skipped_samples": collector.state()[1]["skipped"],
    }
    return Calibration(modules, collector.samples, info, key)


def begin(model: nn.Module, config: TLoraConfig) -> tuple[Cohort, nn.Module, list[Target]]:
    """Return the ranks that calibrate together, the model inside its wrappers, and its targets.

    Raises:
        CalibrationError: as `checked_targets`, or the model is wrapped by the first FSDP.
        ConfigError: no module matches.
    """
    ranks, model = cohort(), unwrapped(model)
    with ranks.together():
        return ranks, model, checked_targets(model, config)


def checked_targets(model: nn.Module, config: TLoraConfig) -> list[Target]:
    """Return the targets of a model that can be calibrated.

    Raises:
        CalibrationError: a parameter is on ``meta`` and nothing loads it, or a target's with those
            of another module alone.
        ConfigError: no module matches.
    """
    refuse_unread(model)
    targets = find_targets(model, config)
    loaded = loaded_by(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and name not in loaded:
            raise CalibrationError(
                f"{name} is on `meta`, without values; load the model's weights to calibrate."
            )
    for target in targets:
        if not can_be_loaded(target.module):
            raise CalibrationError(
                f"{target.name}: its weight is loaded with those of an outer module"
                " (`preload_module_classes`) and cannot be read alone; offload without that option."
            )
    warn_of_unmatched(model, config, stacklevel=2)
    warn_of_unadapted_experts(model, config, stacklevel=2)
    warn_of_second_names(model, targets, stacklevel=2)
    return targets


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run passes inside: the model is frozen and in eval mode, and afterwards as it was."""
    reshard(model)
    with preserved(model), resharded(model), torch.inference_mode(False):
        yield


def first_pass(
    collector: Collector, batches: Iterable[Mapping[str, Any]], config: TLoraConfig, bar: Any
) -> None:
    """Read every batch once, with a backward pass where the configuration needs sensitivities.

    Args:
        collector: takes the statistics in.
        batches: as for `calibrate`.
        config: as for `calibrate`.
        bar: of `progress_bar`.

    Raises:
        CalibrationError: as `calibrate`.
    """
    with collector.ranks.together():
        for batch in batches:
            size = reading.batch_size(batch) if isinstance(batch, Mapping) else 0
            where = partial(collector.doing, collector.given, size)
            within_memory(partial(_read, collector, batch), where, size, config)
            bar.update(collector.given - bar.n)
        collector.keep_company()
    collector.pool()
    if collector.samples == 0:
        refuse_none_left(collector.skipped)
    warn_of_unreached(collector.unreached(), stacklevel=3)


def _read(collector: Collector, batch: Any) -> None:
    collector.stage = "the transfer"
    collector.add(reading.as_batch(batch, device_of(collector.model)))


def progress_bar(batches: Any, show: bool) -> Any:
    """Return a bar that counts samples, on a terminal only."""
    from tqdm.auto import tqdm

    dataset = getattr(batches, "dataset", None)
    total = len(dataset) if isinstance(dataset, Sized) else None
    if total is None and isinstance(batches, list | tuple):
        total = sum(
            reading.batch_size(b)
            for b in batches
            if isinstance(b, Mapping) and any(isinstance(v, Tensor) for v in b.values())
        )
    # disable=None: silent where standard error is no terminal.
    disable = None if show else True
    return tqdm(total=total, desc="Calibrating", unit=" samples", disable=disable)
