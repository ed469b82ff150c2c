"""A short training of an adapted model, for experiments that `tlora compare` has no options for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

Batch = Mapping[str, Tensor]


def train(model: nn.Module, batches: Sequence[Batch], rate: float, warmup: int = 10) -> None:
    """Take one step on each batch: AdamW without weight decay, cosine schedule, clipped at 1.

    Args:
        model: what of it requires gradients is trained.
        batches: each is a step; with "labels".
        rate: the highest learning rate.
        warmup: steps of the linear warm-up.
    """
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(moved, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


@torch.no_grad()
def token_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Return the mean loss of a causal model, in nats per token that has a label."""
    total, count = 0.0, 0
    for batch in batches:
        labeled = int((batch["labels"][:, 1:] >= 0).sum())
        total, count = total + float(model(**batch).loss) * labeled, count + labeled
    return total / count
