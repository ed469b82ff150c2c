"""Matrix products: factored where the factors are thin, and always in full precision."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda", "xpu", "mps")

P = ParamSpec("P")

T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``function`` multiply in the dtype of its arguments, regardless of autocast.

    Autocast would round the factors of each product to 16 bits, and TF32 (`tf32` of the trainer)
    to 10 bits of mantissa, so second moments, gradients and subspaces would lose precision.
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
    """Return the names of the tensors that hold an infinity or a NaN; reads each device once.

    Args:
        tensors: of any shape, dtype and device; integers and 8-bit floats count as finite.
    """
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            # NaN propagates into both the minimum and the maximum.
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
    # Torch before 2.9 has one switch; setting the newer one afterwards would raise.
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
    """M = L R, m x d; or M = L alone.

    With fewer tokens than columns, W C = (W X^T / n) X has fewer inner than outer columns, so
    forming C or W C would waste work.

    Attributes:
        left: L, m x k; without ``right``, M itself, m x d.
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
        """Return ||M||_F^2, a float64 scalar, without forming M from its factors.

        ||L R||_F^2 = sum_jk (L^T L)_jk (R R^T)_jk, two k x k matrices.
        """
        if self.right is None:
            norm: Tensor = torch.linalg.vector_norm(self.left, dtype=torch.float64)
            return norm.square()
        grams = (self.left.T @ self.left).mul_(self.right @ self.right.T)
        return grams.sum(dtype=torch.float64).clamp_min(0)

    def reduced(self) -> tuple[Tensor, Tensor | None]:
        """Return N and Q with M = N Q^T and Q orthonormal, where N has no more columns than L or M.

        Q is None if N is M itself.
        """
        if self.right is None or self.right.shape[0] >= self.right.shape[1]:
            return self.dense(), None
        basis, triangle = torch.linalg.qr(self.right.T)
        return self.left @ triangle.T, basis
