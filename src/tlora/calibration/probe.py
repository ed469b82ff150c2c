"""`calibrate`: runs a few samples of the task through the model and collects statistics."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import nn

from tlora.calibration import batches as reading
from tlora.calibration.accumulators import MomentAccumulator
from tlora.calibration.backward import backward_for
from tlora.calibration.budget import MemoryBudget, given
from tlora.calibration.collector import Collector
from tlora.calibration.group import ProcessGroup, process_group
from tlora.calibration.language_model import log_unadapted_towers
from tlora.calibration.limits import fault_of_ids
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
from tlora.calibration.statistics import (
    Calibration,
    Key,
    calibration_file,
    digested,
    model_key,
)
from tlora.calibration.targets import (
    check_config,
    find_targets,
    warn_of_second_names,
    warn_of_unadapted_experts,
)
from tlora.calibration.weights import Target
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError, OutOfMemoryError

T = TypeVar("T")

_KEEPS_ALL = (
    "a calibration keeps every second moment: `memory_budget` and "
    'covariance="streamed" only bound `get_tlora_model` without `cache`.'
)


class CalibrateOptions(TypedDict, total=False):
    """Options for reading calibration samples: the keywords of `calibrate`, documented there."""

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

    The model is restored afterwards (parameters, ``requires_grad``, ``.grad``, modes, hooks, random
    states), also if a batch raises. Dropout is off while it runs. All second moments and gradients
    stay in memory; `get_tlora_model` bounds them by ``config.memory_budget``.

    In a process group every process passes its share of the batches (any number, or none) and gets
    all samples' statistics, up to rounding; passing all batches on every process gives the same
    result. An error on one process is raised on all, with its process number.

    Args:
        model: the base model, weights loaded, no adapters; DDP, FSDP2 and DeepSpeed's engine may
            hold it (docs/distributed.md).
        batches: dicts of the model's forward arguments; a DataLoader works as it is. They are read
            once, so a generator works too. A batch of B padded samples gives the same result as B
            batches of one. Labels are needed if ranks or scales are allocated or `basis` needs
            gradients; mask the prompt as in training.
        config: selects modules and statistics. Logs a warning if it bounds second moments
            (`memory_budget` as a size, streamed), since all of them are kept.
        progress: show a progress bar of samples (only on a terminal).
        skip_bad_samples: skip samples without a counted label, or with activations, loss or
            gradients that are not finite, as if they had not been given; one warning names them.
        cache: a file. If it holds the calibration of this model, these batches and modules, it is
            loaded and nothing runs; otherwise it is written at the end.

    Raises:
        CalibrationError: no samples; a bad sample (named, with the module), or no good one; no
            loss; a model on ``meta``; out of memory; ``cache`` holds another calibration.
        ArtifactError: ``cache`` is damaged or another kind of file.
        ConfigError: no module matches ``target_modules``.
    """
    check_config(config)
    if config.bounds_moments:
        warnings.warn(_KEEPS_ALL, stacklevel=2)
    group, model, targets = begin(model, config)
    run = _Run(group, model, targets, batches, config, progress, skip_bad_samples)
    stats = run.measured() if cache is None else run.cached(calibration_file(cache))
    skipped = stats.info.get("skipped_samples", {}) if group.is_main_process else {}
    warn_of_skipped(skipped, stats.samples + len(skipped), stacklevel=2)
    return stats


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
        """Key of all processes' batches, process by process."""
        digests = self.group.all_gather(self.digests)
        return Key(self.model_key, list(itertools.chain(*digests)))

    def cached(self, file: Path) -> Calibration:
        """Return the calibration in ``file``; if there is none, measure and write it.

        Raises:
            CalibrationError: it is of another model, other samples or another configuration, or
                the folder cannot be made.
        """
        with self.group.raise_on_all():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CalibrationError(
                    f"a calibration cannot be kept in {file.parent}: {error.strerror}; give "
                    "`cache` another folder."
                ) from error
        if self.group.broadcast(file.is_file(), 0):
            return self._loaded(file)
        stats = self.measured()
        with self.group.raise_on_all():
            if self.group.is_main_process:
                stats.save(file)
        return stats

    def _loaded(self, file: Path) -> Calibration:
        # Iterating a DataLoader draws random numbers.
        with random_states_kept(), self.group.raise_on_all():
            stats = Calibration.load(file)
            for _ in digested(self.batches, self.digests):
                pass
        key = self.key
        with self.group.raise_on_all():
            differing = []
            if stats.key is None or stats.key.model != key.model:
                differing.append("model (other parameters)")
            if stats.key is None or stats.key.data != key.data:
                differing.append("data (other samples, or in another order or other batches)")
            faults = stats.lacks([target.name for target in self.targets], self.config)
            if not self.skip_bad_samples and stats.info.get("skipped"):
                faults.append("it skips bad samples: allow that by skip_bad_samples")
            if faults:
                differing.append(f"config ({'; '.join(faults)})")
            if differing:
                verb = "differs" if len(differing) == 1 else "differ"
                raise CalibrationError(
                    f"{file} is another calibration: its {' and its '.join(differing)} {verb};"
                    " give another `cache`, or delete this file to calibrate again."
                )
        return stats

    def measured(self) -> Calibration:
        """Read the batches and return the statistics."""
        config, group = self.config, self.group
        accumulator = MomentAccumulator() if config.needs_moments else None
        backward = backward_for(config)
        reads = Collector(
            self.model, self.targets, accumulator, backward, self.skip_bad_samples, group
        )
        bar = progress_bar(self.batches, self.progress and group.is_main_process)
        with probing(self.model), bar:
            first_pass(reads, digested(self.batches, self.digests), given(config), bar)
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
        CalibrationError: as `checked_targets`, or the model is wrapped by FSDP1.
        ConfigError: no module matches.
    """
    group, model = process_group(), unwrapped(model)
    with group.raise_on_all():
        return group, model, checked_targets(model, config)


def checked_targets(model: nn.Module, config: TLoraConfig) -> list[Target]:
    """Return the targets of a model that can be calibrated.

    Raises:
        CalibrationError: a parameter is on ``meta`` and nothing loads it, or a target's weight
            loads only together with another module's.
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
    warn_of_second_names(model, targets, stacklevel=2)
    warn_of_unadapted_experts(model, config, stacklevel=2)
    log_unadapted_towers(model, config)
    return targets


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run passes in the body: the model is frozen and in eval mode, and restored afterwards."""
    reshard(model)
    with preserved(model), resharded(model), torch.inference_mode(False):
        yield


def first_pass(
    collector: Collector, batches: Iterable[Mapping[str, Any]], budget: MemoryBudget, bar: Any
) -> None:
    """Read every batch once, with a backward pass where the configuration needs sensitivities.

    Raises:
        CalibrationError: as `calibrate`.
    """
    with collector.group.raise_on_all():
        for batch in batches:
            size = reading.batch_size(batch) if isinstance(batch, Mapping) else 0
            where = partial(collector.doing, collector.given, size)
            within_memory(partial(_read, collector, batch), where, size, budget)
            bar.update(collector.given - bar.n)
        collector.run_spare_passes()
    collector.pool()
    if collector.samples == 0 and collector.skipped:
        raise CalibrationError(
            f"all {len(collector.skipped)} calibration samples are bad:"
            f" {_listed(collector.skipped)}; give samples that train, or calibrate in float32 or"
            " bfloat16."
        )
    if collector.samples == 0:
        raise CalibrationError("`batches` gave no sample; give at least one batch.")
    if unreached := collector.unreached():
        # Such as targets whose weight another module reads.
        warnings.warn(
            f"{_first(unreached)} ran in no calibration batch, so their inputs are unknown "
            "and an adapter may learn nothing there; exclude them (`exclude_modules`) or "
            "give samples that reach them.",
            stacklevel=4,
        )


def _read(collector: Collector, batch: Any) -> None:
    collector.stage = "the transfer"
    collector.add(checked_batch(collector.model, batch))


def checked_batch(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return a batch on the model's device, checked: ids out of range would crash a GPU process.

    Raises:
        CalibrationError: it cannot be read, or has ids or positions outside the model's range.
    """
    read = reading.as_batch(batch, device_of(model))
    ids = read.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.numel():
        fault = fault_of_ids(model, ids.shape[-1], int(ids.max()))
        if fault:
            raise CalibrationError(f"input_ids has {fault}.")
    return read


def progress_bar(batches: Any, show: bool) -> Any:
    """Return a progress bar that counts samples, on a terminal only."""
    from tqdm.auto import tqdm

    dataset = getattr(batches, "dataset", None)
    total = len(dataset) if isinstance(dataset, Sized) else None
    # disable=None: silent if standard error is not a terminal.
    disable = None if show else True
    return tqdm(total=total, desc="Calibrating", unit=" samples", disable=disable)


def within_memory(
    action: Callable[[], T], where: Callable[[], str], samples: int, budget: MemoryBudget
) -> T:
    """Return ``action()``; if memory runs out, report where and what to lower.

    A device raises torch.OutOfMemoryError, the CPU's allocator a bare RuntimeError.

    Args:
        action: what to run.
        where: describes the current step; called after a failure.
        samples: number in the batch; 0: none is in memory.
        budget: memory budget of the second moments.

    Raises:
        OutOfMemoryError: memory ran out.
        RuntimeError: any other error of ``action``.
    """
    try:
        return action()
    except RuntimeError as error:
        text = str(error).strip()
        known = ("DefaultCPUAllocator", "out of memory")
        if not (isinstance(error, torch.OutOfMemoryError) or any(each in text for each in known)):
            raise
    smaller = ""
    if samples > 1:
        smaller = (
            " make the batches smaller (`calibration.batch_size` on the command line; this one has"
            f" {samples} samples), or"
        )
    elif samples:
        smaller = " shorten the samples (`data.max_length` on the command line), or"
    # Not inside `except`: the first error keeps all tensors of the failed step alive.
    raise OutOfMemoryError(
        f"out of memory in {where()}: {text.splitlines()[0].rstrip('.')};{smaller} lower "
        f"`memory_budget` (currently {budget})."
    )


def warn_of_skipped(skipped: Mapping[Any, str], given: int, stacklevel: int) -> None:
    """Warn once about the samples of ``given`` that were skipped, by their numbers."""
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {given} calibration samples are bad and were skipped, counted "
            f"from 0: {_listed(skipped)}.",
            stacklevel=stacklevel + 1,
        )


def _listed(skipped: Mapping[Any, str]) -> str:
    return _first([f"{number} ({reason})" for number, reason in skipped.items()])


def _first(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 10} more" if texts[10:] else ""
    return ", ".join(texts[:10]) + more
