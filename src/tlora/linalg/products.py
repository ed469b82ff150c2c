"""Matrix products with float32 sums and results, from 16-bit factors where the device supports it.

Tensor cores multiply 16-bit numbers an order of magnitude faster than float32 ones. The product of
two bfloat16 (or two float16) numbers is exact in float32, so summing them in float32 is as accurate
as converting the factors first. A float32 number is the sum of three bfloat16 terms of 8 bits each,
exactly unless its magnitude is below 2^-110: a product with float32 factors becomes a few products
of their terms (Henry, Tang, Heinecke 2019, arXiv 1904.06376).

On a device without such products, the factors are converted to float32: the same products, summed
in another order. This is the CPU path, and the reference in tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def multiplies_narrow(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices into a float32 result."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if "dtype" not in torch.ops.aten.bmm.overloads():
        return False  # torch before 2.8
    return torch.cuda.get_device_capability(device) >= (8, 0)


def factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return two matrices as `product` needs them: unchanged, or converted to float32."""
    if left.dtype == right.dtype and left.dtype in NARROW and multiplies_narrow(left.device):
        return left, right
    return left.float(), right.float()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in float32: exact products, float32 sums.

    Args:
        left: m x k, any floating dtype; or a batch of such matrices, B x m x k.
        right: k x n, or B x k x n.
    """
    left, right = factors(left, right)
    return left @ right if left.dtype == torch.float32 else _narrow_product(left, right)


def _narrow_product(left: Tensor, right: Tensor) -> Tensor:
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    return multiply(left, right, out_dtype=torch.float32)


def terms(matrix: Tensor, count: int) -> list[Tensor]:
    """Return bfloat16 matrices whose sum is ``matrix``, up to 2^(-8 count) of each entry.

    Args:
        matrix: any floating dtype; a bfloat16 matrix is its own single term.
        count: maximum number of terms. Three represent a float32 number, two a float16 one.
    """
    if matrix.dtype == torch.bfloat16:
        return [matrix]
    rest, found = matrix.float(), []
    for _ in range(count):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return found


def product_of_terms(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return (sum of ``left``) @ (sum of ``right``) in float32, from their `terms`.

    Pairs beyond the last term of the longer list are skipped: they are as small as the error of the
    terms themselves.

    Raises:
        ValueError: a factor has no terms.
    """
    most = max(len(left), len(right))
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < most]
    total = None
    # Smallest first, so that small terms are not lost in the sum.
    for i, j in sorted(pairs, key=sum, reverse=True):
        part = product(left[i], right[j])
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("a factor has no terms")
    return total
