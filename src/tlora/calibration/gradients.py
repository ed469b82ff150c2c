"""What a backward pass is run for: sensitivities, and what some bases are made from.

The mean gradient G = (1/n) sum_s dL_s/dW takes m x d numbers a module, the second moment that
gradients weight, N = (1/n) sum_s sum_t ||delta_t||^2 x_t x_t^T, d x d; neither is shared by modules
that read the same tensor. Both are held from the first batch to the last.

Source: docs/method.md, 9.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.calibration.bank import new_moment, sum_over
from tlora.calibration.distributed import Cohort
from tlora.calibration.offload import device_of
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.targets import Target
from tlora.calibration.weights import dense_weight
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError
from tlora.linalg.gradient import add_gradient, gradient_weighted, of_own_losses
from tlora.linalg.magnitude import Pairs, squared_norm, weighted_magnitude
from tlora.linalg.moments import SecondMoment


@dataclass(frozen=True)
class Measure:
    """One number for each sample, from its gradient of a module's weight.

    Attributes:
        values: takes W (None, if it is not read) and the pairs of each sample, and gives the sum
            over the m d entries of what is averaged.
        power: of the factor that turns the gradient into that of the sample's own loss.
        reads_weight: whether W is needed.
        statistic: the attribute of `ModuleStatistics` that holds the mean over samples; None: it
            only tells whether a gradient is finite.
    """

    values: Callable[[Tensor | None, Sequence[Pairs]], Tensor]
    power: int
    reads_weight: bool
    statistic: str | None

    def of(self, target: Target, samples: Sequence[Pairs], factors: Sequence[float]) -> Tensor:
        """Return the number of each sample, on the device of the weight or of the pairs."""
        weight = dense_weight(target) if self.reads_weight else None
        values = self.values(weight, samples)
        own = [factor**self.power for factor in factors]
        weights = torch.tensor(own, dtype=values.dtype, device=values.device)
        return weights * values / (target.d_out * target.d_in)


def _magnitude(weight: Tensor | None, samples: Sequence[Pairs]) -> Tensor:
    if weight is None:
        raise ValueError("the weight is needed")
    return weighted_magnitude(weight, samples)


def _squares(_: Tensor | None, samples: Sequence[Pairs]) -> Tensor:
    return squared_norm(samples)


def _size(_: Tensor | None, samples: Sequence[Pairs]) -> Tensor:
    """Return sum |delta| of each sample: finite where every entry is."""
    like = next(delta for pairs in samples for delta, _ in pairs)
    return torch.stack(
        [sum((d.abs().sum() for d, _ in pairs), start=like.new_zeros(())) for pairs in samples]
    )


MAGNITUDE = Measure(_magnitude, 1, True, "sensitivity")
FISHER = Measure(_squares, 2, False, "fisher")
FINITE = Measure(_size, 1, False, None)


class GradientBank:
    """Accumulates mean gradients and gradient-weighted second moments of the targets.

    Args:
        config: says which of both.
        kept: names of the targets to accumulate them for; None: all.
    """

    def __init__(self, config: TLoraConfig, kept: Collection[str] | None = None) -> None:
        self.means = config.needs_gradient
        self.weighted = config.needs_gradient_moment
        self.kept = None if kept is None else frozenset(kept)
        self.totals: dict[str, Tensor] = {}
        self.moments: dict[str, SecondMoment] = {}

    def keeps(self, target: Target) -> bool:
        """Return whether a target's gradients are accumulated."""
        return self.kept is None or target.name in self.kept

    def update(self, target: Target, samples: Sequence[Pairs], factors: Sequence[float]) -> None:
        """Add a batch.

        Args:
            target: the module.
            samples: the pairs (delta, x) of each sample; one of them at least has one.
            factors: see `SensitivityPass`.
        """
        if not self.keeps(target):
            return
        delta, x = of_own_losses(samples, factors)
        if self.means:
            add_gradient(self._total(target), delta, x)
        if self.weighted:
            moment = self._moment(target)
            moment.add_rows(gradient_weighted(delta, x).to(moment.device))

    def give(self, target: Target, to: ModuleStatistics) -> None:
        """Hand G and N, where they are wanted, over to a target's statistics.

        G (m x d float32) takes the place of the sum. Both are zero where no loss depends on the
        module.

        Raises:
            CalibrationError: one is not finite.
        """
        if not self.keeps(target):
            return
        if self.means:
            to.gradient = self._total(target).div_(to.samples)
            del self.totals[target.name]
            _refuse_overflown(to.gradient, f"{target.name}: its mean gradient")
        if self.weighted:
            moment = to.gradient_moment = self._moment(target)
            moment.samples = to.samples
            kept = moment.scatter.diagonal() if moment.rows is None else moment.rows
            _refuse_overflown(kept, f"{target.name}: its gradient-weighted second moment")
            del self.moments[target.name]

    def pool(self, targets: Iterable[Target], ranks: Cohort) -> None:
        """Add up what all ranks have accumulated, so that each holds the sum."""
        if ranks.size == 1:
            return
        kept = [target for target in targets if self.keeps(target)]
        seen = [target.name in self.totals or target.name in self.moments for target in kept]
        for target, anywhere in zip(kept, ranks.highest(seen), strict=True):
            if anywhere and self.means:
                self.totals[target.name] = ranks.add(self._total(target))
            if anywhere and self.weighted:
                self.moments[target.name] = sum_over(ranks, self._moment(target))

    def _total(self, target: Target) -> Tensor:
        if target.name not in self.totals:
            shape, device = (target.d_out, target.d_in), device_of(target.module)
            self.totals[target.name] = torch.zeros(shape, device=device)
        return self.totals[target.name]

    def _moment(self, target: Target) -> SecondMoment:
        if target.name not in self.moments:
            self.moments[target.name] = new_moment(target)
        return self.moments[target.name]


def _refuse_overflown(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise CalibrationError(
            f"{what} overflows, though the gradient of every sample is finite; calibrate in"
            " float32 or bfloat16."
        )


@dataclass(frozen=True)
class Backward:
    """What a backward pass is run for.

    Attributes:
        measure: of each sample and target.
        bank: where gradients are accumulated; None: they are not wanted.
    """

    measure: Measure
    bank: GradientBank | None = None

    @property
    def statistic(self) -> str | None:
        """Which sensitivity is measured, as an attribute of `ModuleStatistics`."""
        return self.measure.statistic


def backward_for(config: TLoraConfig, kept: Collection[str] | None = None) -> Backward | None:
    """Return what a configuration asks of the backward pass, None where it needs none.

    Args:
        config: the adapter.
        kept: names of the targets whose gradients are accumulated; None: of all.
    """
    if not config.needs_backward:
        return None
    wanted = {MAGNITUDE: config.needs_sensitivity, FISHER: config.needs_fisher}
    measure = next((each for each, needed in wanted.items() if needed), FINITE)
    needed = config.needs_gradient or config.needs_gradient_moment
    return Backward(measure, GradientBank(config, kept) if needed else None)


def backward_again(config: TLoraConfig) -> Backward | None:
    """Return what a further pass for the sake of the basis asks of a backward pass.

    Nothing is measured again but whether gradients are finite. None where none is needed.
    """
    if not (config.needs_gradient or config.needs_gradient_moment):
        return None
    return Backward(FINITE, GradientBank(config))
