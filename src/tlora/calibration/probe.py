"""`calibrate`: a few samples of the task through the model, and what was seen of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration import batches as reading
from tlora.calibration.bank import MomentBank
from tlora.calibration.collector import Collector
from tlora.calibration.preserve import preserved
from tlora.calibration.statistics import Calibration, ModuleStatistics
from tlora.calibration.targets import Target, find_targets, fused_expert_parameters
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: TLoraConfig,
    *,
    progress: bool = True,
) -> Calibration:
    """Measure the statistics that ``plan`` needs, on a few samples of the task.

    The model comes back as it was (parameters, ``requires_grad``, ``.grad``, modes, hooks, random
    states), also when a batch raises. Dropout is off while it runs.

    Args:
        model: the base model, weights loaded, no adapters.
        batches: dicts of what its forward takes; a DataLoader works as it is. A batch of B padded
            samples gives what B batches of one give. Labels are needed where ranks or scales are
            allocated, with the prompt masked as in training.
        config: which modules, and which statistics.
        progress: show a bar with samples and time left (on a terminal only).

    Raises:
        CalibrationError: no samples, a loss that is missing or not finite (the sample is named),
            activations that are not finite (the module is named), a model on ``meta``.
        ConfigError: no module matches ``target_modules``.
    """
    targets = checked_targets(model, config)
    bank = MomentBank() if config.needs_moments else None
    with probing(model):
        collector = first_pass(model, targets, batches, bank, config, progress=progress)
    modules = {}
    for target in targets:
        moment = None if bank is None else bank.moment(target.name)
        modules[target.name] = ModuleStatistics(
            name=target.name,
            d_in=target.d_in,
            d_out=target.d_out,
            samples=collector.samples,
            sensitivity=collector.sensitivity(target.name),
            moment=moment,
            moment_id=-1 if bank is None else bank.group_of[target.name],
        )
    info = {"model": type(model).__name__, "config": config.to_dict()}
    return Calibration(modules, collector.samples, info)


def checked_targets(model: nn.Module, config: TLoraConfig) -> list[Target]:
    """Return the targets of a model that can be calibrated.

    Raises:
        CalibrationError: a parameter is on ``meta``.
        ConfigError: no module matches.
    """
    targets = find_targets(model, config)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CalibrationError(
                f"{name} is on `meta`, without values; load the model's weights to calibrate."
            )
    if config.target_modules == "all-linear":
        _warn_of_fused_experts(model)
    return targets


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run passes inside: the model is frozen and in eval mode, and afterwards as it was."""
    with preserved(model), torch.inference_mode(False):
        yield


def first_pass(
    model: nn.Module,
    targets: list[Target],
    batches: Iterable[Mapping[str, Any]],
    bank: MomentBank | None,
    config: TLoraConfig,
    *,
    progress: bool,
) -> Collector:
    """Read every batch once, with a backward pass where the configuration needs sensitivities.

    Raises:
        CalibrationError: as `calibrate`.
    """
    collector = Collector(model, targets, bank, backward=config.needs_sensitivity)
    device = next(model.parameters()).device
    with _progress_bar(batches, progress) as bar:
        for batch in batches:
            before = collector.samples
            collector.add(reading.as_batch(batch, device))
            bar.update(collector.samples - before)
    if collector.samples == 0:
        raise CalibrationError("`batches` gave no sample; give at least one batch.")
    return collector


def _warn_of_fused_experts(model: nn.Module) -> None:
    if fused := fused_expert_parameters(model):
        more = f" and {len(fused) - 3} more" if fused[3:] else ""
        warnings.warn(
            f"{type(model).__name__} keeps experts in fused parameters, which no Linear wraps and"
            f" which are not adapted: {', '.join(fused[:3])}{more}.",
            stacklevel=3,
        )


def _progress_bar(batches: Any, show: bool) -> Any:
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
