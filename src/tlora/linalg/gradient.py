"""What a batch's output gradients add to the mean gradient and to the moment that they weight.

Sources: the mean gradient: LoRA-GA, arXiv 2407.05000, section 3.2; here it gives directions of a
frozen A alone. The weighted moment: docs/method.md, 9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tlora.linalg.magnitude import Pairs
from tlora.linalg.precision import full_precision


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
    return torch.linalg.vector_norm(delta, dim=1, keepdim=True) * x
