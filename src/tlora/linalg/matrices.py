"""Products of matrices: in two factors where these are thin, and always in full precision.

Then what output gradients say of a weight, from pairs (delta, x); no sample's is held whole. With
G_s = dL_s/dW = delta_s^T X_s: sum |W * G_s| (arXiv 2604.18124, section 3; docs/method.md, 2) or
sum G_s^2 of each sample, and what a batch adds to the mean gradient (LoRA-GA, arXiv 2407.05000,
section 3.2; here it gives directions of a frozen A alone) and to the moment that gradients weight
(docs/method.md, 9).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda", "xpu", "mps")

P = ParamSpec("P")

T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``function`` multiply in the dtype of what it is given, whatever autocast says.

    Autocast would round the factors of each product to 16 bits, and TF32 (`tf32` of the trainer)
    to 10 of mantissa: second moments, gradients and subspaces would be those of rounded numbers.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_tf32())
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold an infinity or a NaN; each device is read once.

    Args:
        tensors: of any shape, dtype and device; integers and 8-bit floats count as finite.
    """
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            # A NaN is both the least and the greatest value.
            least, greatest = tensor.detach().aminmax()
            finite = least.isfinite() & greatest.isfinite()
            flags.setdefault(tensor.device, {})[name] = ~finite
    return [
        name
        for found in flags.values()
        for name, bad in zip(found, torch.stack([*found.values()]).tolist(), strict=True)
        if bad
    ]


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    # Torch before 2.9 has one switch; to set the newer one afterwards would be refused.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@dataclass(frozen=True)
class FactoredMatrix:
    """M = L R, m x d; or M = L itself.

    With fewer tokens than columns W C = (W X^T / n) X has fewer inner than outer columns, and
    neither C nor W C is worth forming.

    Attributes:
        left: L, m x k; M itself, m x d, without ``right``.
        right: R, k x d, or None.
    """

    left: Tensor
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """m and d."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def times(self, block: Tensor) -> Tensor:
        """Return M V for V, d x l."""
        return self.left @ (block if self.right is None else self.right @ block)

    def transposed_times(self, block: Tensor) -> Tensor:
        """Return M^T U for U, m x l."""
        image = self.left.T @ block
        return image if self.right is None else self.right.T @ image

    def dense(self) -> Tensor:
        """Return M, m x d."""
        return self.left if self.right is None else self.left @ self.right

    def energy(self) -> Tensor:
        """Return ||M||_F^2, a float64 scalar; of factors without forming M.

        ||L R||_F^2 = sum_jk (L^T L)_jk (R R^T)_jk, two k x k matrices.
        """
        if self.right is None:
            norm: Tensor = torch.linalg.vector_norm(self.left, dtype=torch.float64)
            return norm.square()
        grams = (self.left.T @ self.left).mul_(self.right @ self.right.T)
        return grams.sum(dtype=torch.float64).clamp_min(0)

    def reduced(self) -> tuple[Tensor, Tensor | None]:
        """Return N and Q with M = N Q^T, Q orthonormal: N has no more columns than L or M.

        Q is None where N is M itself.
        """
        if self.right is None or self.right.shape[0] >= self.right.shape[1]:
            return self.dense(), None
        basis, triangle = torch.linalg.qr(self.right.T)
        return self.left @ triangle.T, basis


# Entries of G formed at once: a megabyte stays in a core's cache, while an accelerator is faster
# with few large products.
_CPU_ENTRIES = 2**18

_DEVICE_ENTRIES = 2**26

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(delta, x) of each call of the module on one sample: T x m and T x d float32."""


@full_precision
def weighted_magnitude(weight: Tensor, samples: Sequence[Pairs]) -> Tensor:
    """Return sum_jk |W_jk| |G_s,jk| of each sample, with G_s = sum over its pairs of delta^T x.

    W is gone through block of rows by block of rows, all samples on each, so that neither |W| nor
    any G_s is ever whole.

    Args:
        weight: W, m x d float32.
        samples: the pairs of each sample.

    Returns:
        A value per sample, on the device of ``weight``; 0 without pairs.
    """
    rows, columns = weight.shape
    entries = _CPU_ENTRIES if weight.device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // columns)
    totals = weight.new_zeros(len(samples))
    buffer = weight.new_empty(min(step, rows), columns)
    for start in range(0, rows, step):
        # `contiguous` for a transposed view; `abs` makes the block's own copy in either case.
        block = weight[start : start + step].abs().contiguous().flatten()
        gradient = buffer[: len(block) // columns]
        for total, pairs in zip(totals, samples, strict=True):
            for index, (delta, x) in enumerate(pairs):
                part = delta[:, start : start + step].T
                torch.addmm(gradient, part, x, beta=float(index > 0), out=gradient)
            if pairs:
                # |W| . |G| as an inner product: one pass over the block, where |W G| takes three.
                total.add_(torch.dot(gradient.abs_().flatten(), block))
    return totals


@full_precision
def squared_norm(samples: Sequence[Pairs]) -> Tensor:
    """Return ||G_s||_F^2 of each sample, with G_s = sum over its pairs of delta^T x.

    With few tokens by two Gram matrices, T x T, over the tokens of all pairs:
    ||delta^T x||_F^2 = sum_tu (delta delta^T)_tu (x x^T)_tu; else block of rows by block of rows.

    Args:
        samples: the pairs of each sample; one of them at least has one.

    Returns:
        A value per sample, float32 on the device of the pairs; 0 without pairs.
    """
    like = next(delta for pairs in samples for delta, _ in pairs)
    totals = like.new_zeros(len(samples))
    for total, pairs in zip(totals, samples, strict=True):
        if pairs:
            delta, x = (torch.cat(rows) for rows in zip(*pairs, strict=True))
            total.copy_(_squared_norm(delta, x))
    return totals


def _squared_norm(delta: Tensor, x: Tensor) -> Tensor:
    tokens, rows, columns = len(delta), delta.shape[1], x.shape[1]
    if tokens * (rows + columns) <= rows * columns:
        return (delta @ delta.T).mul_(x @ x.T).sum().clamp_min(0)
    entries = _CPU_ENTRIES if delta.device.type == "cpu" else _DEVICE_ENTRIES
    blocks = delta.split(max(1, entries // columns), dim=1)
    return torch.stack([(block.T @ x).square().sum() for block in blocks]).sum()


def of_own_losses(samples: Sequence[Pairs], factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return delta and X of all samples, each sample's delta that of its own loss.

    Args:
        samples: the pairs (delta, x) of each sample, T x m and T x d; one of them at least has one.
        factors: B; what turns the gradient of the batch's loss into that of the sample's own.

    Returns:
        delta, tokens x m, and X, tokens x d.
    """
    each = [
        (factor * delta, x)
        for factor, pairs in zip(factors, samples, strict=True)
        for delta, x in pairs
    ]
    deltas, inputs = zip(*each, strict=True)
    return torch.cat(deltas), torch.cat(inputs)


@full_precision
def add_gradient(total: Tensor, delta: Tensor, x: Tensor) -> None:
    """Add sum_s dL_s/dW = delta^T X to ``total`` (m x d float32), by one product for all samples.

    Args:
        total: changed in place; on the device of the rows.
        delta: tokens x m, each row the gradient of its sample's own loss.
        x: tokens x d.
    """
    total.addmm_(delta.T, x)


def gradient_weighted(delta: Tensor, x: Tensor) -> Tensor:
    """Return the rows ||delta_t|| x_t, so that X'^T X' = sum_t ||delta_t||^2 x_t x_t^T.

    That is the sum of g^T g over the tokens' own gradients g = delta_t x_t^T (m x d): what the
    gradient of the weight would be from each token alone.

    Args:
        delta: tokens x m, each row the gradient of its sample's own loss.
        x: tokens x d.
    """
    norms: Tensor = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    return norms * x
