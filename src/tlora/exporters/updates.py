"""Norms, differences, spectra and overlaps of adapter updates s B A.

The product of d_out x d_in is never formed. Both sides of a difference share one QR: with
[B_1, B_2] = Q_B R_B and [A_1; A_2]^T = Q_A R_A, the norm of s_1 B_1 A_1 - s_2 B_2 A_2 is that of
R_B diag(s_1, -s_2) R_A^T. All of it is float64; a difference of Gram matrices would lose half of
the digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.adapter.saved import Factors, SavedLora
from tlora.exporters.truncate import small


@dataclass(frozen=True)
class Pair:
    """The update of a module as read, and its reference.

    Attributes:
        read: R_B R_A^T of the matrices read, k x k with k = r_1 + r_2, or none.
        meant: s R_B R_A^T of the reference, k x k, or none.
        unit: the error norm of B A from rounding B and A once.
        scale: PEFT's scale of the matrices read.
    """

    read: Tensor | None
    meant: Tensor | None
    unit: float
    scale: float

    @property
    def effect(self) -> float:
        """The norm of the reference update."""
        return 0.0 if self.meant is None else float(self.meant.norm())

    @property
    def rounding(self) -> float:
        """The norm of the difference explained by rounding."""
        return self.unit * abs(self.scale)

    def error(self, scale: float) -> float:
        """Return the norm of the difference for a reader that multiplies by ``scale``."""
        if self.read is None:
            return self.effect
        return float((scale * self.read - (0.0 if self.meant is None else self.meant)).norm())


class Pairs(Mapping[str, Pair]):
    """The updates of two LoRAs by module, each computed once.

    Args:
        read: the LoRA as read.
        meant: the reference.
    """

    def __init__(self, read: SavedLora, meant: SavedLora) -> None:
        self._read, self._meant = read, meant
        self._made: dict[str, Pair] = {}

    @classmethod
    def of(cls, lora: SavedLora) -> Pairs:
        """Return a LoRA paired with itself."""
        return cls(lora, lora)

    def __iter__(self) -> Iterator[str]:
        """Yield the modules of both."""
        return iter({**self._meant.keys, **self._read.keys})

    def __len__(self) -> int:
        """Return the number of modules."""
        return len({*self._meant.keys, *self._read.keys})

    def __getitem__(self, name: str) -> Pair:
        """Compute the pair of a module."""
        if name not in self._made:
            self._made[name] = self._pair(name)
        return self._made[name]

    def _pair(self, name: str) -> Pair:
        if self._read is self._meant:
            scale = self._read.scale(name)
            plain = _unscaled(self._read.factors(name))
            return Pair(plain, scale * plain, 0.0, scale)
        if name not in self._read.keys:
            return Pair(None, small(self._meant.factors(name))[1], 0.0, 0.0)
        read = self._read.factors(name)
        if name not in self._meant.keys:
            return Pair(_unscaled(read), None, 0.0, read.scale)
        ours, theirs = both(read, self._meant.factors(name))
        return Pair(ours, theirs, rounding(read), read.scale)


def _unscaled(factors: Factors) -> Tensor:
    return small(Factors(factors.a, factors.b, 1.0))[1]


def both(one: Factors, other: Factors) -> tuple[Tensor, Tensor]:
    """Return B_1 A_1 without its scale and s_2 B_2 A_2 in one orthonormal basis, k x k each.

    Raises:
        ValueError: their sizes differ.
    """
    a = [each.a.double().flatten(1) for each in (one, other)]
    b = [each.b.double().flatten(1) for each in (one, other)]
    if a[0].shape[1] != a[1].shape[1] or b[0].shape[0] != b[1].shape[0]:
        sizes = [f"{y.shape[0]} x {x.shape[1]}" for x, y in zip(a, b, strict=True)]
        raise ValueError(f"{sizes[0]} in one and {sizes[1]} in the other")
    r_b, r_a = (torch.linalg.qr(torch.cat(m, 1), mode="r")[1] for m in (b, [x.T for x in a]))
    rank = one.rank
    ours = r_b[:, :rank] @ r_a[:, :rank].T
    return ours, other.scale * r_b[:, rank:] @ r_a[:, rank:].T


def rounding(factors: Factors) -> float:
    """Return the error norm of B A from rounding A and B to their dtypes.

    With errors of at most u |b_ij| that are independent of each other, the mean square of
    ||dB A||_F is at most u^2 / 3 sum_j ||b_j||^2 ||a_j||^2, b_j and a_j being columns of B and rows
    of A; that of B dA is the same. Returned is sqrt(3) times the root of both.
    """
    sums = [_squares(factors.a.flatten(1).T), _squares(factors.b.flatten(1))]
    (a, off_a), (b, off_b) = sums
    return math.sqrt(float((a * off_b + b * off_a).sum()))


def _squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared norms of the columns, and of their largest rounding errors."""
    limits = torch.finfo(matrix.dtype)
    values = matrix.double()
    off = (values.abs() * limits.eps / 2).clamp_min(limits.tiny * limits.eps / 2)
    return values.square().sum(0), off.square().sum(0)


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of the normalized singular values; 0 if all are zero.

    It equals r if r of them are equal and the others zero.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, 2007.
    """
    total = values.sum()
    if not total:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def cosine(one: Tensor, other: Tensor) -> float | None:
    """Return <D_1, D_2> / (||D_1|| ||D_2||) of two updates, in [-1, 1]; None if one is zero.

    Args:
        one: D_1, in any orthonormal basis, such as that of `both`.
        other: D_2, in the same basis.
    """
    norms = float(one.norm()) * float(other.norm())
    return min(1.0, max(-1.0, float((one * other).sum()) / norms)) if norms else None


def overlap(one: Factors, other: Factors, leading: int | None = None) -> tuple[float, float]:
    """Return how much the row spaces (input directions) of two updates agree.

    Args:
        one: the first update.
        other: the second.
        leading: number of leading right singular vectors to compare; None: all with nonzero
            singular values.

    Returns:
        ||V_1^T V_2||_F^2 / min(r_1, r_2), from 0 (orthogonal) to 1 (one contains the other), with
        orthonormal bases V; and the largest principal angle in degrees. Zeros if one has rank 0.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 7.2; Golub and Van Loan, Matrix
    Computations, 4th edition, section 6.4.3.
    """
    bases = [_row_space(each)[:, :leading] for each in (one, other)]
    least = min(basis.shape[1] for basis in bases)
    if not least:
        return 0.0, 0.0
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1])[:least].clamp(max=1.0)
    angle = math.degrees(math.acos(float(cosines[-1])))
    return float(cosines.square().sum()) / least, angle


def _row_space(factors: Factors) -> Tensor:
    """Return an orthonormal basis (d_in, rank) of the rows of s B A, by its numerical rank."""
    _, core, q_a = small(factors)
    _, values, v = torch.linalg.svd(core)
    if not values[0]:
        return q_a[:, :0]
    kept = int((values > values[0] * max(core.shape) * torch.finfo(core.dtype).eps).sum())
    return q_a @ v[:kept].T
