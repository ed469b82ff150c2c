"""Streaming second moment of a module's inputs, centered over each sample's own tokens.

Source: arXiv 2604.18124, section 3 and the released code (docs/method.md, 2). The latter divides
neither by T_s nor by the number of modules; nor do we.
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
        centered: tokens x d; padding is left out.
        weighted_means: sqrt(T_s) mean_t X_s, B x d.
        tokens: real tokens.
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
        places: of the real tokens among the B T rows, if they are known: to look them up, the host
            waits for an accelerator.
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
        # where, not multiplication: padding may hold inf or NaN, and 0 * inf is NaN.
        zero = x.new_zeros(())
        means = torch.where(keep, x, zero).sum(dim=1) / counts.clamp_min(1)
        places = keep.flatten().nonzero().flatten() if places is None else places
        centered = (x - means[:, None]).flatten(0, 1)[places.to(x.device)]
        tokens = len(centered)
    return CenteredRows(centered, counts.sqrt() * means, tokens)


class SecondMoment:
    """C = (1/n) sum_s (X_s - mean_t X_s)^T (X_s - mean_t X_s), accumulated batch by batch.

    Symbols: X_s is T_s x d, the inputs of one module on sample s (T_s real tokens; padding never
    counts); n counts every sample seen, also one that brought the module no token (an expert that
    routing never reached). The centering mean is that of the sample itself, so a batch of padded
    samples gives what the samples give one at a time, whatever their order.

    The means are kept beside the centered moment as the rows sqrt(T_s) mean_t X_s, because
    C0 = C + (1/n) sum_s T_s mean_s mean_s^T then gives the uncentered moment for n x d numbers.

    While the centered rows take no more room than C (about d / 2 tokens), they are kept and C is
    not formed: W C is cheaper from them (`weighted`). C is symmetric: its lower triangle is kept,
    packed (`PackedTriangle`).

    Args:
        dim: d, the module's input columns.
        dtype: of the accumulator; float32 is enough for the subspace, float64 where asked.
        device: where to accumulate; that of the inputs avoids a copy per batch.
        space: `packed_numbers(d)` zeros to accumulate in, in place of new ones. The rows are kept
            in it too.
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
        self._narrow = True  # whether all rows so far are 16-bit numbers less a mean
        self._rows = [like.new_zeros(0, dim)]
        self._means = [like.new_zeros(0, dim)]

    @property
    def dim(self) -> int:
        """d, the number of input columns."""
        return self._means[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where it accumulates."""
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
        """n C; forms C for good where only rows were kept."""
        return self._form()

    @property
    def weighted_means(self) -> Tensor:
        """The rows sqrt(T_s) mean_t X_s, n x d, in the order the samples came."""
        return _joined(self._means)

    @full_precision
    def update(
        self, inputs: Tensor, mask: Tensor | None = None, places: Tensor | None = None
    ) -> None:
        """Add a batch of samples.

        Args:
            inputs: B x T x d, any floating dtype: the module's inputs of B samples.
            mask: B x T, true (nonzero) at real tokens; None: every token is real.
            places: of the real tokens among the B T rows, if they are known (`centered_rows`).
        """
        rows = centered_rows(inputs, mask, self._means[0].dtype, places)
        self._add(rows.centered, inputs.dtype in NARROW)
        self._means.append(rows.weighted_means.to(self.device))
        self.samples += inputs.shape[0]
        self.tokens += rows.tokens

    @full_precision
    def add_rows(self, rows: Tensor) -> None:
        """Add tokens x d rows as they are: no mean is taken off, and no sample counted.

        A moment takes either these or samples (`update`). ``samples``, the divisor, is the
        caller's to set.
        """
        self._add(rows.to(self._means[0].dtype), rows.dtype in NARROW)
        self.tokens += len(rows)

    def _add(self, rows: Tensor, narrow: bool) -> None:
        narrow = narrow and rows.dtype == torch.float32  # float64 was asked for to be exact
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
        """Return the place of ``count`` rows in the space, from row ``first`` on."""
        return self._space[first * self.dim :][: count * self.dim].view(count, self.dim)  # type: ignore[index]

    def _form(self) -> PackedTriangle:
        """Put n C in the place of the rows, if that is still to be done; return it."""
        if self._formed is None:
            rows = _joined(self._rows)
            if self._space is None:
                self._space = rows.new_zeros(packed_numbers(self.dim))
            elif len(rows):
                # They lie where C is to be; joined, they are a copy.
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
        """Return W C: in factors where there are only rows, and never by a copy of C.

        Args:
            weight: W, m x d; its device is that of the product, its dtype too unless it is 16-bit,
                whose product is float32.
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
        """Return the tensors that `take` takes: the mean rows, and the rows or n C, packed."""
        rows = self.rows
        kept = {"scatter": self.scatter.numbers} if rows is None else {"rows": rows}
        return {"means": self.weighted_means} | kept

    def take(self, parts: Mapping[str, Tensor], samples: int, tokens: int) -> None:
        """Copy the `parts` of another one into this one, which has seen nothing."""
        if "rows" in parts:
            self._keep(parts["rows"].to(self.device, copy=True))
            self._narrow = False
        else:
            self.scatter.numbers.copy_(parts["scatter"])
        self._means = [parts["means"].to(self.device, copy=True)]
        self.samples, self.tokens = samples, tokens

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], samples: int, tokens: int) -> SecondMoment:
        """Rebuild one from its `parts`, which it goes on with as they are, and the counts."""
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
    """Return a list's rows as one tensor, which takes their place in it."""
    if len(parts) > 1:
        parts[:] = [torch.cat(parts)]
    return parts[0]
