"""`calibrate`: a few samples of the task through the model, and what was seen of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from tlora.calibration import batches as reading
from tlora.calibration.accumulators import MomentAccumulator
from tlora.calibration.backward import backward_for
from tlora.calibration.cache import (
    Key,
    digested,
    model_key,
    refuse_another,
    refuse_skipped,
    refuse_unwritable,
)
from tlora.calibration.collector import Collector
from tlora.calibration.expert_parameters import warn_of_unadapted_experts
from tlora.calibration.faults import (
    refuse_none_left,
    warn_of_skipped,
    warn_of_unreached,
    within_memory,
)
from tlora.calibration.group import ProcessGroup, process_group
from tlora.calibration.placement import (
    can_be_loaded,
    class_name,
    device_of,
    loaded_by,
    refuse_unread,
    reshard,
    resharded,
    unwrapped,
)
from tlora.calibration.preserve import preserved, random_states_kept
from tlora.calibration.statistics import Calibration, calibration_file
from tlora.calibration.targets import find_targets, warn_of_second_names, warn_of_unmatched
from tlora.calibration.weights import Target
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError, ConfigError


class CalibrateOptions(TypedDict, total=False):
    """How calibration samples are read: the keywords of `calibrate`, which explains them."""

    progress: bool
    skip_bad_samples: bool
    cache: str | Path | None


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
    states), also when a batch raises. Dropout is off while it runs. All second moments and
    gradients are held; `get_tlora_model` bounds them by ``config.memory_budget``.

    In a process group every process gives its share of the batches (any number, or none) and gets
    all samples' statistics, up to rounding; all batches on every process give the same. What one
    process raises is raised on all, with its number.

    Args:
        model: the base model, weights loaded, no adapters; DDP, FSDP2 and DeepSpeed's engine may
            hold it (docs/distributed.md).
        batches: dicts of what its forward takes; a DataLoader works as it is. They are read once,
            so a generator will do. A batch of B padded samples gives what B batches of one give.
            Labels are needed where ranks or scales are allocated, or `basis` needs gradients; with
            the prompt masked as in training.
        config: which modules, and which statistics.
        progress: show a bar with samples and time left (on a terminal only).
        skip_bad_samples: leave out samples without a label that counts, or whose activations, loss
            or gradient are not finite, as if they had not been given; one warning names them.
        cache: a file. If it holds the calibration of this model, these batches and modules, it is
            loaded and nothing runs; else it is written at the end.

    Raises:
        CalibrationError: no samples; a bad sample (it is named, and the module), or none that is
            good; no loss; a model on ``meta``; memory ran out; ``cache`` is another calibration.
        ArtifactError: ``cache`` is damaged, or something else.
        ConfigError: no module matches ``target_modules``, or ``config`` bounds the second moments
            (`memory_budget`, streamed), all of which a calibration keeps.
    """
    _refuse_bounded(config)
    group, model, targets = begin(model, config)
    run = _Run(group, model, targets, batches, config, progress, skip_bad_samples)
    stats = run.measured() if cache is None else run.cached(calibration_file(cache))
    skipped = stats.info.get("skipped_samples", {}) if group.is_main_process else {}
    warn_of_skipped(skipped, stats.samples + len(skipped), stacklevel=2)
    return stats


def _refuse_bounded(config: TLoraConfig) -> None:
    """Refuse a configuration that bounds what a calibration keeps.

    Raises:
        ConfigError: it does.
    """
    if config.plans_in_blocks:
        raise ConfigError(
            "a calibration keeps every second moment, which `memory_budget` and"
            ' covariance="streamed" rule out; call `get_tlora_model`, which plans in blocks, or'
            " leave these fields out.",
            where="memory_budget",
        )


@dataclass
class _Run:
    """One call of `calibrate`, in this process of the group."""

    group: ProcessGroup
    model: nn.Module
    targets: list[Target]
    batches: Iterable[Mapping[str, Any]]
    config: TLoraConfig
    progress: bool
    skip_bad_samples: bool

    def __post_init__(self) -> None:
        self.model_key = model_key(self.model)
        self.digests: list[str] = []

    @property
    def key(self) -> Key:
        """Key of all processes' batches that were read, one process's after the other's."""
        digests = self.group.all_gather(self.digests)
        return Key(self.model_key, tuple(itertools.chain(*digests)))

    def cached(self, file: Path) -> Calibration:
        """Return the calibration that ``file`` holds; where there is none, measure and write it.

        Raises:
            CalibrationError: it is of another model, other samples or another configuration.
        """
        with self.group.raise_on_all():
            refuse_unwritable(file.parent)
        if self.group.broadcast(file.is_file(), 0):
            return self._loaded(file)
        stats = self.measured()
        with self.group.raise_on_all():
            if self.group.is_main_process:
                stats.save(file)
        return stats

    def _loaded(self, file: Path) -> Calibration:
        # A DataLoader draws random numbers to be looked through.
        with random_states_kept(), self.group.raise_on_all():
            stats = Calibration.load(file)
            for _ in digested(self.batches, self.digests):
                pass
        key = self.key
        with self.group.raise_on_all():
            names = [target.name for target in self.targets]
            refuse_another(file, stats.key, key, stats.lacks(names, self.config))
            refuse_skipped(file, 0 if self.skip_bad_samples else stats.info.get("skipped", 0))
        return stats

    def measured(self) -> Calibration:
        """Read the batches, and return what was measured."""
        config, group = self.config, self.group
        accumulator = MomentAccumulator() if config.needs_moments else None
        backward = backward_for(config)
        reads = Collector(
            self.model, self.targets, accumulator, backward, self.skip_bad_samples, group
        )
        bar = progress_bar(self.batches, self.progress and group.is_main_process)
        with probing(self.model), bar:
            first_pass(reads, digested(self.batches, self.digests), config, bar)
        return _calibration(reads, accumulator, self.key, config)


def _calibration(
    collector: Collector, accumulator: MomentAccumulator | None, key: Key, config: TLoraConfig
) -> Calibration:
    modules = {}
    for target in collector.targets:
        module = modules[target.name] = collector.measured(target)
        if accumulator is not None:
            module.moment = accumulator.moment(target.name)
            module.moment_id = accumulator.moment_ids[target.name]
        if collector.gradients is not None:
            collector.gradients.give(target, module)
    skipped = {str(number): reason for number, reason in collector.skipped.items()}
    info = {
        "model": class_name(collector.model),
        "config": config.to_dict(),
        "skipped": len(skipped),
        "skipped_samples": skipped,
    }
    return Calibration(modules, collector.samples, info, key)


def begin(model: nn.Module, config: TLoraConfig) -> tuple[ProcessGroup, nn.Module, list[Target]]:
    """Return the process group, the model inside its wrappers, and its targets.

    Raises:
        CalibrationError: as `checked_targets`, or the model is wrapped by the first FSDP.
        ConfigError: no module matches.
    """
    group, model = process_group(), unwrapped(model)
    with group.raise_on_all():
        return group, model, checked_targets(model, config)


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
    with collector.group.raise_on_all():
        for batch in batches:
            size = reading.batch_size(batch) if isinstance(batch, Mapping) else 0
            where = partial(collector.doing, collector.given, size)
            within_memory(partial(_read, collector, batch), where, size, config)
            bar.update(collector.given - bar.n)
        collector.run_spare_passes()
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
