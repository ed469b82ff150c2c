"""One forward and backward per batch: second moments and sensitivities of every target.

How a batch is read, in order:

1. forward; hooks keep each target's input X and make its output a place where the gradient can be
   seen (a graph starts at the first targets, so nothing before them is differentiated);
2. the inputs are split into samples, checked to be finite, and added to the second moments, once
   for modules that read the same tensor;
3. backward; when the gradient delta of a target's output arrives, |W * (delta_s^T X_s)| of every
   sample is averaged and both tensors are dropped, so no full set of gradients is ever held.

Source: arXiv 2604.18124, section 3 (docs/method.md, 2). The release runs one sample at a time.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration import batches as reading
from tlora.calibration.hooks import Record, recording
from tlora.calibration.preserve import preserved
from tlora.calibration.sensitivity import SensitivityPass
from tlora.calibration.statistics import Calibration, ModuleStatistics
from tlora.calibration.targets import Target, find_targets, fused_expert_parameters
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError
from tlora.linalg.moments import SecondMoment


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
    targets = find_targets(model, config)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CalibrationError(
                f"{name} is on `meta`, without values; load the model's weights to calibrate."
            )
    if config.target_modules == "all-linear":
        _warn_of_fused_experts(model)
    collector = _Collector(model, targets, config)
    with preserved(model), _progress_bar(batches, progress) as bar, torch.inference_mode(False):
        for batch in batches:
            before = collector.samples
            collector.add(reading.as_batch(batch, next(model.parameters()).device))
            bar.update(collector.samples - before)
    return collector.result()


class _Collector:
    """Accumulates the statistics of all targets over batches."""

    def __init__(self, model: nn.Module, targets: list[Target], config: TLoraConfig) -> None:
        self.model = model
        self.targets = targets
        self.config = config
        self.samples = 0
        self.sensitivity: dict[str, Tensor] = {}
        self.moments: dict[int, SecondMoment] = {}
        self.moment_of: dict[str, int] = {}

    def add(self, batch: dict[str, Any], alone: bool = False) -> None:
        """Add a batch; cut it into single samples where its rows or loss cannot be split.

        Args:
            batch: tensors on the model's device.
            alone: it is one such sample, without padding.
        """
        weights = reading.loss_weights(batch, self.model)
        known = weights is not None or reading.batch_size(batch) == 1
        if known or not self.config.needs_sensitivity:
            try:
                self._add(batch, weights)
                return
            except reading.UnknownLayout:
                if alone:
                    raise CalibrationError(
                        f"sample {self.samples}: its rows of some module's input cannot be told"
                        " from padding; give it without padding."
                    ) from None
        for sample in reading.single_samples(batch, self.model):
            self.add(sample, alone=True)

    def result(self) -> Calibration:
        """Return the statistics.

        Raises:
            CalibrationError: there was no sample, or a sensitivity is not finite.
        """
        if self.samples == 0:
            raise CalibrationError("`batches` gave no sample; give at least one batch.")
        modules = {}
        for target in self.targets:
            sensitivity = self._mean_sensitivity(target.name)
            key = self.moment_of.get(target.name, -1)
            modules[target.name] = ModuleStatistics(
                name=target.name,
                d_in=target.d_in,
                d_out=target.d_out,
                samples=self.samples,
                sensitivity=sensitivity,
                moment=self.moments.get(key),
                moment_id=key,
            )
        info = {"model": type(self.model).__name__, "config": self.config.to_dict()}
        return Calibration(modules, self.samples, info)

    def _mean_sensitivity(self, name: str) -> float | None:
        if not self.config.needs_sensitivity:
            return None
        total = self.sensitivity.get(name)
        # A module that no sample reached does not move the loss.
        value = 0.0 if total is None else total.item() / self.samples
        if not math.isfinite(value):
            raise CalibrationError(
                f"{name}: the gradient of the loss is not finite; calibrate in float32 or"
                " bfloat16, or leave the sample out."
            )
        return value

    def _add(self, batch: dict[str, Any], weights: Tensor | None) -> None:
        backward = self.config.needs_sensitivity
        layout = reading.token_layout(batch, self.model)
        records = {target.name: Record(target) for target in self.targets}
        with (
            recording(self.model, records.values(), layout, backward),
            torch.set_grad_enabled(backward),
        ):
            outputs = self.model(**batch, **_forward_options(self.model, batch))
        for record in records.values():
            record.split(layout)
        self._check_finite(records)
        if backward:
            factors = self._checked_weights(weights)
            loss = self._finite_loss(outputs, batch)
        if self.config.needs_moments:
            self._share(records)
            self._update_moments(records, layout.size)
        if backward:
            with SensitivityPass(records.values(), factors, self.sensitivity):
                # It does not where these samples reach no target (an expert).
                if loss.requires_grad:
                    loss.backward()
        self.samples += layout.size

    def _check_finite(self, records: dict[str, Record]) -> None:
        calls = [
            (r.target.name, call)
            for r in records.values()
            for call in r.calls
            if call.inputs.numel() > 0
        ]
        if not calls:
            return
        device = calls[0][1].inputs.device
        # A sum is finite only if every entry is: the cheapest check, one transfer for all. Should
        # finite entries overflow it, the exact look below finds nothing wrong.
        sums = [c.inputs.sum(dtype=torch.float32).to(device) for _, c in calls]
        if torch.stack(sums).isfinite().all():
            return
        for name, call in calls:
            bad = ~call.rows.isfinite().all(dim=-1)
            if call.mask is not None:
                bad &= call.mask
            if bad.any():
                sample = self.samples + int(bad.any(dim=1).nonzero()[0])
                raise CalibrationError(
                    f"{name}: its input is not finite on sample {sample} (counted from 0); check"
                    " that sample, or calibrate in float32 or bfloat16."
                )

    def _checked_weights(self, weights: Tensor | None) -> Tensor:
        if weights is None:
            return torch.ones(1)
        empty = (~weights.isfinite()).nonzero()
        if len(empty):
            raise CalibrationError(
                f"sample {self.samples + int(empty[0])} (counted from 0) has no label that counts:"
                " every label is -100, so its loss is undefined; leave it out or truncate less."
            )
        return weights

    def _finite_loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise CalibrationError(
                f"{type(self.model).__name__} returned no single loss for a batch with the keys"
                f" {sorted(batch)}; add `labels`, or allocate neither ranks nor scales."
            )
        if not loss.isfinite():
            sample = self._first_bad_sample(batch)
            raise CalibrationError(
                f"the loss of sample {sample} (counted from 0) is {loss.item()}; check its labels"
                " and text, or calibrate in float32 or bfloat16."
            )
        return loss

    def _first_bad_sample(self, batch: dict[str, Any]) -> int:
        with torch.no_grad():
            for index, sample in enumerate(reading.single_samples(batch, self.model)):
                if not self.model(**sample)["loss"].isfinite():
                    return self.samples + index
        return self.samples

    def _share(self, records: dict[str, Record]) -> None:
        """Give modules that read the same tensors one second moment.

        Modules that shared so far and read different tensors in this batch part here, before it
        is added, each with a copy of what they have in common.
        """
        seen: dict[tuple[Any, ...], int] = {}
        for name, record in records.items():
            key = (self.moment_of.get(name), record.source)
            if key not in seen:
                seen[key] = self._new_moment(record, key[0], taken=set(seen.values()))
            self.moment_of[name] = seen[key]

    def _new_moment(self, record: Record, old: int | None, taken: set[int]) -> int:
        if old is not None and old not in taken:
            return old
        new = len(self.moments)
        if old is not None:
            self.moments[new] = self.moments[old].clone()
        else:
            device = next(record.target.module.parameters()).device
            self.moments[new] = SecondMoment(record.target.d_in, device=device)
        return new

    def _update_moments(self, records: dict[str, Record], size: int) -> None:
        done: set[int] = set()
        for name, record in records.items():
            key = self.moment_of[name]
            if key not in done:
                done.add(key)
                rows, mask = record.joined(size)
                self.moments[key].update(rows.to(self.moments[key].scatter.device), mask)


def _warn_of_fused_experts(model: nn.Module) -> None:
    if fused := fused_expert_parameters(model):
        more = f" and {len(fused) - 3} more" if fused[3:] else ""
        warnings.warn(
            f"{type(model).__name__} keeps experts in fused parameters, which no Linear wraps and"
            f" which are not adapted: {', '.join(fused[:3])}{more}.",
            stacklevel=3,
        )


def _forward_options(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Switch the key-value cache off where the model has one: nothing is generated here."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes and "use_cache" not in batch else {}


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
