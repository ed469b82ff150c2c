"""Keeps trainable parameters in float32, whatever the precision of the base model's weights.

PEFT stores its adapter matrices in float32 and casts their inputs. A new head, a bias, and with
`full` every weight, have the base's own dtype, and 16 bits are too few for small updates: bfloat16
has eight bits of precision, so a step of 2e-5 changes no weight above 0.01, and AdamW's epsilon
rounds to zero in float16, so that it divides zero by zero.

If such parameters are converted, the model computes under autocast in the base's dtype, so that
they match the weights beside them. Otherwise nothing changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def widen(model: nn.Module) -> None:
    """Convert 16-bit trainable parameters to float32 in place; the model then uses autocast.

    Ties stay, since the parameters are the same objects. An active autocast, such as the trainer's
    own (`bf16`, `fp16`), does not change.

    Args:
        model: ready to train; for a `peft.PeftModel` the base model's forward changes, which
            generation calls too.
    """
    import torch

    sixteen = (torch.bfloat16, torch.float16)
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in sixteen]
    if not narrow:
        return
    dtype = narrow[0].dtype
    for parameter in narrow:
        parameter.data = parameter.data.float()
    bare: Any = getattr(model, "get_base_model", lambda: model)
    _compute_in(bare(), dtype)


def _compute_in(model: Any, dtype: Any) -> None:
    """Make every forward pass of ``model`` run under autocast to ``dtype``."""
    import torch

    forward = model.forward

    @functools.wraps(forward)
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        device = next(model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            return forward(*args, **kwargs)
        with torch.autocast(device, dtype):
            return forward(*args, **kwargs)

    model.forward = under_autocast
