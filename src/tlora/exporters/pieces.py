"""Compute one tensor of a merged model in float32, rounding once."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.errors import AdapterError
from tlora.exporters.base import DTYPES, refuse_infinite
from tlora.exporters.changes import Change, check_fit
from tlora.exporters.checkpoint import CODES, Piece, Stored

_NOTHING = 1e-4
"""Fraction of the update that rounding to float32 never reaches."""


@dataclass
class Rounding:
    """Rounding error of the updates, as squared Frobenius norms over all modules."""

    lost: float = 0.0
    whole: float = 0.0

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Add one weight."""
        self.lost += float((rounded.float() - exact).square().sum(dtype=torch.float64))
        self.whole += float((exact - before.float()).square().sum(dtype=torch.float64))

    def notes(self) -> Iterator[str]:
        """Yield a note if the error is not negligible, as it is in float32."""
        share = math.sqrt(self.lost / self.whole) if self.whole else 0.0
        if share > _NOTHING:
            yield (
                f"Rounding changes the merged weights by {share:.2%} of the update (in norm);"
                " --dtype float32 or serving the adapter unmerged avoids this."
            )


def piece(
    name: str,
    stored: Stored | None,
    change: Change | None,
    code: str,
    dtype: str,
    rounding: Rounding,
) -> Piece:
    """Return a tensor to write, computed just before it is written.

    Args:
        name: name of the tensor, for errors.
        stored: the base's tensor; None if it has none.
        change: the adapter's change.
        code: safetensors' name of the base's dtype.
        dtype: name of the requested dtype.
        rounding: accumulates the rounding error.

    Raises:
        AdapterError: the adapter does not fit the tensor.
    """
    if change:
        check_fit(name, change, stored.shape if stored else None)
    if code not in CODES.values():
        if change is None and stored is not None:
            return Piece(code, stored.shape, stored.bytes, stored.read)
        raise AdapterError(
            f"{name} is stored as {code}, which cannot absorb an update; give a full-precision"
            " base with --model."
        )
    wanted = DTYPES.get(dtype) or next(each for each, its in CODES.items() if its == code)
    before = stored.shape if stored else ()
    shape = change.shape(before) if change else before
    make = functools.partial(_made, name, stored, change, wanted, rounding)
    return Piece(CODES[wanted], shape, math.prod(shape) * wanted.itemsize, make)


def _made(
    name: str,
    stored: Stored | None,
    change: Change | None,
    dtype: torch.dtype,
    rounding: Rounding,
) -> Tensor:
    before = None if stored is None or (change and change.replaces) else stored.read()
    tensor = before if change is None else change(before)
    assert tensor is not None  # without a change there is a stored tensor
    rounded = tensor.to(dtype)
    if tensor.isfinite().all():
        refuse_infinite({name: rounded})
    if change and change.update and before is not None and before.shape == tensor.shape:
        rounding.add(before, tensor, rounded)
    return rounded
