"""W C, formed or as the two factors that it comes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
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
            return torch.linalg.vector_norm(self.left, dtype=torch.float64).square()
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
