"""Streaming second moment of a module's inputs, centred over each sample's own tokens.

Source: arXiv 2604.18124, section 3 and the released code (docs/method.md, 2). The latter divides
neither by T_s nor by the number of modules; nor do we.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256  # rows of C that are updated at once


@dataclass(frozen=True)
class CentredRows:
    """The inputs of a batch, each sample centred over its own tokens.

    Attributes:
        centred: (B T) x d; zero rows at padding.
        weighted_means: sqrt(T_s) mean_t X_s, B x d.
        tokens: real tokens.
    """

    centred: Tensor
    weighted_means: Tensor
    tokens: int


def centred_rows(inputs: Tensor, mask: Tensor | None, dtype: torch.dtype) -> CentredRows:
    """Centre each sample of a batch over its own real tokens.

    Args:
        inputs: B x T x d, any floating dtype.
        mask: B x T, true (nonzero) at real tokens; None: every token is real.
        dtype: of the result and of the means.
    """
    x = inputs.detach().to(dtype)
    if mask is None:
        counts = torch.full((x.shape[0], 1), float(x.shape[1]), dtype=x.dtype, device=x.device)
        means = x.mean(dim=1) if x.shape[1] else x.sum(dim=1)
        centred = x - means[:, None]
        tokens = x.shape[0] * x.shape[1]
    else:
        keep = mask.to(device=x.device, dtype=torch.bool)[..., None]
        counts = keep.sum(dim=1).to(x.dtype)
        # where, not multiplication: padding may hold inf or NaN, and 0 * inf is NaN.
        zero = x.new_zeros(())
        means = torch.where(keep, x, zero).sum(dim=1) / counts.clamp_min(1)
        centred = torch.where(keep, x - means[:, None], zero)
        tokens = int(mask.count_nonzero())
    return CentredRows(centred.flatten(0, 1), counts.sqrt() * means, tokens)


class SecondMoment:
    """C = (1/n) sum_s (X_s - mean_t X_s)^T (X_s - mean_t X_s), accumulated batch by batch.

    Symbols: X_s is T_s x d, the inputs of one module on sample s (T_s real tokens; padding never
    counts); n counts every sample seen, also one that brought the module no token (an expert that
    routing never reached). The centring mean is that of the sample itself, so a batch of padded
    samples gives what the samples give one at a time, whatever their order.

    The means are kept beside the centred moment as the rows sqrt(T_s) mean_t X_s, because
    C0 = C + (1/n) sum_s T_s mean_s mean_s^T then gives the uncentred moment for n x d numbers.

    C is symmetric: only the lower triangle of ``scatter`` (n C) is kept up to date.

    Args:
        dim: d, the module's input columns.
        dtype: of the accumulator; float32 is enough for the subspace, float64 where asked.
        device: where to accumulate; that of the inputs avoids a copy per batch.
        scatter: zeros to accumulate in, d x d, in place of new ones; may be mapped to a file.
    """

    def __init__(
        self,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        scatter: Tensor | None = None,
    ) -> None:
        if scatter is None:
            scatter = torch.zeros(dim, dim, dtype=dtype, device=device)
        self.scatter = scatter
        self.samples = 0
        self.tokens = 0
        self._means: list[Tensor] = []

    @property
    def dim(self) -> int:
        """d, the number of input columns."""
        return self.scatter.shape[0]

    @property
    def weighted_means(self) -> Tensor:
        """The rows sqrt(T_s) mean_t X_s, n x d, in the order the samples came."""
        if not self._means:
            return self.scatter.new_zeros(0, self.dim)
        if len(self._means) > 1:
            self._means = [torch.cat(self._means)]
        return self._means[0]

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of samples.

        Args:
            inputs: B x T x d, any floating dtype: the module's inputs of B samples.
            mask: B x T, true (nonzero) at real tokens; None: every token is real.
        """
        rows = centred_rows(inputs, mask, self.scatter.dtype)
        self._add_product(rows.centred)
        self._means.append(rows.weighted_means.to(self.scatter.device))
        self.samples += inputs.shape[0]
        self.tokens += rows.tokens

    def _add_product(self, rows: Tensor) -> None:
        """Add X^T X to the lower triangle, block row by block row: about half of the products.

        Where the rows are on another device than the accumulator, each block goes there and back.
        """
        for start in range(0, self.dim, _BLOCK):
            stop = start + _BLOCK
            block = self.scatter[start:stop, :stop]
            there = block.to(rows.device)
            there.addmm_(rows[:, start:stop].T, rows[:, :stop])
            if there is not block:
                block.copy_(there)

    def _symmetric(self, scatter: Tensor) -> Tensor:
        """Return scatter / n with its lower triangle mirrored to the upper one."""
        lower = scatter.tril().div_(max(self.samples, 1))
        return lower.add_(lower.tril(-1).T)

    def merge(self, other: SecondMoment) -> None:
        """Add the samples that ``other`` has seen, as if this accumulator had seen them.

        Raises:
            ValueError: the two have different numbers of columns.
        """
        if other.dim != self.dim:
            raise ValueError(f"second moments of {self.dim} and {other.dim} columns do not merge")
        self.scatter += other.scatter.to(self.scatter)
        self._means.append(other.weighted_means.to(self.scatter))
        self.samples += other.samples
        self.tokens += other.tokens

    def clone(self, into: Tensor | None = None) -> SecondMoment:
        """Return an independent copy, its scatter in ``into`` (d x d) where that is given."""
        scatter = self.scatter.clone() if into is None else into.copy_(self.scatter)
        means = self.weighted_means.to(scatter.device, copy=True)
        return SecondMoment.from_parts(scatter, means, self.samples, self.tokens)

    def move(self, device: torch.device | str) -> None:
        """Move the accumulator to ``device`` in place."""
        self.scatter = self.scatter.to(device)
        self._means = [means.to(device) for means in self._means]

    def covariance(self) -> Tensor:
        """Return C, d x d in the accumulator's dtype: symmetric, positive semi-definite."""
        return self._symmetric(self.scatter)

    def uncentred(self) -> Tensor:
        """Return C0 = (1/n) sum_s X_s^T X_s, d x d, from the centred moment and the means."""
        means = self.weighted_means
        return self._symmetric(torch.addmm(self.scatter, means.T, means))

    @classmethod
    def from_parts(
        cls, scatter: Tensor, weighted_means: Tensor, samples: int, tokens: int
    ) -> SecondMoment:
        """Rebuild one from what it holds: n C (its lower triangle), mean rows, and the counts."""
        moment = cls.__new__(cls)
        moment.scatter = scatter
        moment._means = [weighted_means]
        moment.samples = samples
        moment.tokens = tokens
        return moment


def merged(moments: Sequence[SecondMoment]) -> SecondMoment:
    """Return the second moment over the samples of all ``moments``; they stay as they are."""
    total = moments[0].clone()
    for moment in moments[1:]:
        total.merge(moment)
    return total
