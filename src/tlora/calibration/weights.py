"""A target's weight as an m x d matrix, however its module stores it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tlora.errors import AdapterError

if TYPE_CHECKING:
    from tlora.calibration.targets import Target


def dense_weight(target: Target) -> Tensor:
    """Return W of a target as d_out x d_in float32, without gradient; a view where it can be.

    Raises:
        AdapterError: the weight is on the meta device or is stored in a form not known here.
    """
    weight = target.module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise AdapterError(
            f"{target.name}: its weight is stored as"
            f" {getattr(weight, 'dtype', type(weight).__name__)}, which cannot be read as a"
            " matrix; load the model unquantised."
        )
    if weight.is_meta:
        raise AdapterError(f"{target.name}: its weight is on `meta`; load the model's weights.")
    weight = weight.detach()
    if isinstance(target.module, Conv1D):
        weight = weight.T
    return weight.to(torch.float32)
