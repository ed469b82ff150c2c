"""A symmetric matrix stored as its lower triangle, in about half the memory.

Block rows of `BLOCK` rows lie one after the other in a flat tensor, each with the columns up to the
end of its diagonal block: d^2 / 2 + 128 d numbers. Each block row is a contiguous matrix that
products accumulate into in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tlora.linalg.products import multiplies_narrow, product_of_terms, terms

BLOCK = 256

# Rows (or columns) that one product computes on an accelerator, which prefers few large products.
_WIDE = 1024


def packed_numbers(dim: int) -> int:
    """Return how many numbers the lower triangle of a dim x dim matrix takes."""
    whole, rest = divmod(dim, BLOCK)
    return BLOCK * BLOCK * whole * (whole + 1) // 2 + rest * dim


class PackedTriangle:
    """A symmetric d x d matrix S in a flat tensor.

    Args:
        numbers: `packed_numbers(d)` numbers, any floating dtype and device; stored, not copied.
        dim: d.
    """

    def __init__(self, numbers: Tensor, dim: int) -> None:
        self.numbers = numbers
        self.dim = dim

    def block_rows(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the first and last row (exclusive) of each block row, and its view: S[i:j, :j]."""
        place = 0
        for start in range(0, self.dim, BLOCK):
            stop = min(start + BLOCK, self.dim)
            size = (stop - start) * stop
            yield start, stop, self.numbers[place : place + size].view(stop - start, stop)
            place += size

    def add_gram(self, rows: Tensor, narrow: bool = False) -> None:
        """Add X^T X, computing about half of its entries.

        Args:
            rows: X, tokens x d, in the dtype of the numbers.
            narrow: X is 16-bit numbers minus a mean: where 16-bit products are faster, X is
                replaced by two bfloat16 terms, accurate to 2^-16 of each entry (docs/cost.md).
        """
        if narrow and multiplies_narrow(rows.device):
            self._add_narrow(terms(rows, 2))
            return
        for start, stop, block in self.block_rows():
            block.addmm_(rows[:, start:stop].T, rows[:, :stop])

    def _add_narrow(self, parts: list[Tensor]) -> None:
        blocks = list(self.block_rows())
        step = _WIDE // BLOCK
        for first in range(0, len(blocks), step):
            some = blocks[first : first + step]
            begin, end = some[0][0], some[-1][1]
            left = [part[:, begin:end].T for part in parts]
            wide = product_of_terms(left, [part[:, :end] for part in parts])
            for start, stop, block in some:
                block.add_(wide[start - begin : stop - begin, :stop])

    def left_times(self, weight: Tensor) -> Tensor:
        """Return W S, m x d, computed in blocks of columns of S.

        Args:
            weight: W, m x d, on any device. A 16-bit W is multiplied by three bfloat16 terms of S
                where 16-bit products are faster, otherwise in float32.

        Returns:
            On the weight's device and in its dtype; float32 for a 16-bit weight.
        """
        narrow = weight.itemsize == 2
        fast = narrow and multiplies_narrow(weight.device)
        left = weight.float() if narrow and not fast else weight
        parts = terms(weight, 2) if fast else []
        result = torch.empty(weight.shape, dtype=left.dtype, device=weight.device)
        result = result.float() if narrow else result
        step = _columns_at_once(weight.device)
        for start in range(0, self.dim, step):
            stop = min(start + step, self.dim)
            columns = self._columns(start, stop).to(result)
            whole = product_of_terms(parts, terms(columns, 3)) if fast else left @ columns
            result[:, start:stop] = whole
        return result

    def _columns(self, start: int, stop: int) -> Tensor:
        """Return S[:, start:stop], d x (stop - start); both are multiples of `BLOCK` or d."""
        columns = self.numbers.new_empty(self.dim, stop - start)
        for first, last, block in self.block_rows():
            if last <= start:
                continue
            if first >= stop:
                columns[first:last] = block[:, start:stop]
                continue
            # A block row through the diagonal: the part left of `stop`, and its mirror image.
            own = slice(first - start, last - start)
            columns[:first, own] = block[:, :first].T
            corner = block[:, first:last].tril()
            columns[first:last, own] = corner + corner.tril(-1).T
            columns[first:last, : first - start] = block[:, start:first]
        return columns

    def diagonal(self) -> Tensor:
        """Return the diagonal, d numbers."""
        return torch.cat([block[:, start:].diagonal() for start, _, block in self.block_rows()])

    def dense(self) -> Tensor:
        """Return S as a new d x d tensor."""
        return self._columns(0, self.dim)


def _columns_at_once(device: torch.device) -> int:
    return BLOCK if device.type == "cpu" else _WIDE
