"""Streaming second moment of a module's inputs, centered over each sample's own tokens.

Source: arXiv 2604.18124, section 3 and the released code (docs/method.md, 2). Like the code, this
divides neither by T_s nor by the number of modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.linalg.matrices import FactoredMatrix, full_precision
from tlora.linalg.packed import PackedTriangle, packed_numbers
from tlora.linalg.products import NARROW, multiplies_narrow, product_of_terms, terms


@dataclass(frozen=True)
class CenteredRows:
    """The inputs of a batch, each sample centered over its own tokens.

    Attributes:
        centered: tokens x d, without padding.
        weighted_means: sqrt(T_s) mean_t X_s, B x d.
        tokens: number of real tokens.
    """

    centered: Tensor
    weighted_means: Tensor
    tokens: int


def centered_rows(
    inputs: Tensor, mask: Tensor | None, dtype: torch.dtype, places: Tensor | None = None
) -> CenteredRows:
    """Center each sample of a batch over its own real tokens.

    Args:
        inputs: B x T x d, any floating dtype.
        mask: B x T, true (nonzero) at real tokens; None: every token is real.
        dtype: of the result and of the means.
        places: positions of the real tokens among the B T rows, if known; looking them up
            synchronizes with an accelerator.
    """
    x = inputs.detach().to(dtype)
    if mask is None:
        counts = torch.full((x.shape[0], 1), float(x.shape[1]), dtype=x.dtype, device=x.device)
        means = x.mean(dim=1) if x.shape[1] else x.sum(dim=1)
        centered = (x - means[:, None]).flatten(0, 1)
        tokens = len(centered)
    else:
        keep = mask.to(device=x.device, dtype=torch.bool)[..., None]
        counts = keep.sum(dim=1).to(x.dtype)
        # `where`, not a product: padding may hold inf or NaN, and 0 * inf is NaN.
        zero = x.new_zeros(())
        means = torch.where(keep, x, zero).sum(dim=1) / counts.clamp_min(1)
        places = keep.flatten().nonzero().flatten() if places is None else places
        centered = (x - means[:, None]).flatten(0, 1)[places.to(x.device)]
        tokens = len(centered)
    return CenteredRows(centered, counts.sqrt() * means, tokens)


class SecondMoment:
    """C = (1/n) sum_s (X_s - mean_t X_s)^T (X_s - mean_t X_s), accumulated batch by batch.

    Symbols: X_s is T_s x d, the inputs of one module on sample s (T_s real tokens; padding never
    counts); n counts every sample seen, including samples that brought the module no token (an
    expert that routing never reached). Each sample is centered by its own mean, so a padded batch
    gives the same result as its samples one at a time, in any order.

    The means are stored beside the centered moment as the rows sqrt(T_s) mean_t X_s, because C0 = C
    + (1/n) sum_s T_s mean_s mean_s^T then recovers the uncentered moment from n x d numbers.

    While the centered rows take no more memory than C (about d / 2 tokens), they are stored and C
    is
    not formed: W C is cheaper from them (`weighted`). C is symmetric, so only its lower triangle is
    stored, packed (`PackedTriangle`).

    Args:
        dim: d, the module's input columns.
        dtype: of the accumulator; float32 is enough for the subspace, float64 gives an exact one.
        device: where to accumulate; the device of the inputs avoids a copy per batch.
        space: `packed_numbers(d)` zeros to accumulate in, instead of a new buffer. The rows are
            stored in it too.
    """

    def __init__(
        self,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        space: Tensor | None = None,
    ) -> None:
        like = space if space is not None else torch.zeros(0, dtype=dtype, device=device)
        self.samples = 0
        self.tokens = 0
        self._space = space
        self._formed: PackedTriangle | None = None
        self._narrow = True  # whether all rows so far are 16-bit numbers minus a mean
        self._rows = [like.new_zeros(0, dim)]
        self._means = [like.new_zeros(0, dim)]

    @property
    def dim(self) -> int:
        """d, the number of input columns."""
        return self._means[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the accumulator."""
        return self._means[0].device

    @property
    def rows(self) -> Tensor | None:
        """The centered rows of all samples, tokens x d; None once C is formed."""
        if self._formed is not None:
            return None
        if self._space is not None:
            return self._space_rows(0, self._held)
        return _joined(self._rows)

    @property
    def _held(self) -> int:
        return sum(map(len, self._rows))

    @property
    @full_precision
    def scatter(self) -> PackedTriangle:
        """n C; forms C permanently if only rows were stored."""
        return self._form()

    @property
    def weighted_means(self) -> Tensor:
        """The rows sqrt(T_s) mean_t X_s, n x d, in the order of the samples."""
        return _joined(self._means)

    @full_precision
    def update(
        self, inputs: Tensor, mask: Tensor | None = None, places: Tensor | None = None
    ) -> None:
        """Add a batch of samples.

        Args:
            inputs: B x T x d, any floating dtype: the module's inputs of B samples.
            mask: B x T, true (nonzero) at real tokens; None: every token is real.
            places: positions of the real tokens among the B T rows, if known (`centered_rows`).
        """
        rows = centered_rows(inputs, mask, self._means[0].dtype, places)
        self._add(rows.centered, inputs.dtype in NARROW)
        self._means.append(rows.weighted_means.to(self.device))
        self.samples += inputs.shape[0]
        self.tokens += rows.tokens

    @full_precision
    def add_rows(self, rows: Tensor) -> None:
        """Add tokens x d rows unchanged: no mean is subtracted and no sample is counted.

        A moment takes either these rows or samples (`update`). The caller sets ``samples``, the
        divisor.
        """
        self._add(rows.to(self._means[0].dtype), rows.dtype in NARROW)
        self.tokens += len(rows)

    def _add(self, rows: Tensor, narrow: bool) -> None:
        narrow = narrow and rows.dtype == torch.float32  # float64 was requested for exactness
        if self._formed is None and (self._held + len(rows)) * self.dim <= packed_numbers(self.dim):
            self._keep(rows)
            self._narrow &= narrow
        else:
            self._form().add_gram(rows, narrow)

    def _keep(self, rows: Tensor) -> None:
        if self._space is not None:
            rows = self._space_rows(self._held, len(rows)).copy_(rows)
        self._rows.append(rows.to(self.device))

    def _space_rows(self, first: int, count: int) -> Tensor:
        """Return a view of ``count`` rows of the space, starting at row ``first``."""
        return self._space[first * self.dim :][: count * self.dim].view(count, self.dim)  # type: ignore[index]

    def _form(self) -> PackedTriangle:
        """Replace the rows by n C unless that is already done; return n C."""
        if self._formed is None:
            rows = _joined(self._rows)
            if self._space is None:
                self._space = rows.new_zeros(packed_numbers(self.dim))
            elif len(rows):
                # The rows occupy the memory of C; joining them makes a copy.
                rows = rows.clone() if rows.data_ptr() == self._space.data_ptr() else rows
                self._space.zero_()
            self._formed = PackedTriangle(self._space, self.dim)
            self._formed.add_gram(rows, self._narrow)
            self._rows = [self._means[0][:0]]
        return self._formed

    @full_precision
    def covariance(self) -> Tensor:
        """Return C, d x d in the accumulator's dtype: symmetric, positive semi-definite."""
        return self.total().div_(max(self.samples, 1))

    @full_precision
    def uncentered(self) -> Tensor:
        """Return C0 = (1/n) sum_s X_s^T X_s, d x d, from the centered moment and the means."""
        total, means = self._total(), self.weighted_means
        total.add_gram(means)
        return total.dense().div_(max(self.samples, 1))

    @full_precision
    def total(self) -> Tensor:
        """Return n C as a new d x d tensor; rows stay rows."""
        return self._total().dense()

    def _total(self) -> PackedTriangle:
        """Return a copy of n C."""
        rows = self.rows
        if rows is None:
            return PackedTriangle(self.scatter.numbers.clone(), self.dim)
        total = PackedTriangle(rows.new_zeros(packed_numbers(self.dim)), self.dim)
        total.add_gram(rows)
        return total

    @full_precision
    def weighted(self, weight: Tensor) -> FactoredMatrix:
        """Return W C: factored while only rows are stored, and never from a copy of C.

        Args:
            weight: W, m x d; it sets the product's device, and its dtype too unless it is 16-bit,
                where the product is float32.
        """
        count, rows = max(self.samples, 1), self.rows
        if rows is None:
            return FactoredMatrix(self.scatter.left_times(weight).div_(count))
        if weight.dtype not in NARROW:
            rows = rows.to(weight)
            return FactoredMatrix((weight @ rows.T).div_(count), rows)
        rows = rows.to(weight.device, torch.float32)
        if multiplies_narrow(weight.device):
            left = product_of_terms(terms(weight, 2), [part.T for part in terms(rows, 3)])
        else:
            left = weight.float() @ rows.T
        return FactoredMatrix(left.div_(count), rows)

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors that `take` accepts: the mean rows, and the rows or packed n C."""
        rows = self.rows
        kept = {"scatter": self.scatter.numbers} if rows is None else {"rows": rows}
        return {"means": self.weighted_means} | kept

    def take(self, parts: Mapping[str, Tensor], samples: int, tokens: int) -> None:
        """Copy the `parts` of another moment into this one, which must be empty."""
        if "rows" in parts:
            self._keep(parts["rows"].to(self.device, copy=True))
            self._narrow = False
        else:
            self.scatter.numbers.copy_(parts["scatter"])
        self._means = [parts["means"].to(self.device, copy=True)]
        self.samples, self.tokens = samples, tokens

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], samples: int, tokens: int) -> SecondMoment:
        """Rebuild a moment from its `parts`, which it then owns, and the counts."""
        means, scatter = parts["means"], parts.get("scatter")
        moment = cls(means.shape[1], means.dtype, means.device, scatter)
        if scatter is None:
            moment._rows, moment._narrow = [parts["rows"]], False
        else:
            moment._formed = PackedTriangle(scatter, moment.dim)
        moment._means = [means]
        moment.samples, moment.tokens = samples, tokens
        return moment


def _joined(parts: list[Tensor]) -> Tensor:
    """Return a list's rows as one tensor, which replaces them in the list."""
    if len(parts) > 1:
        parts[:] = [torch.cat(parts)]
    return parts[0]
