"""Operations of each stage of an initialization, counted from shapes, and a device's peak.

A product of m x k and k x n counts 2 m k n, a symmetric one half of it. C counts where more than
d / 2 tokens are read; W C as a product with C, or with fewer tokens with the rows; singular vectors
by a sketch of l = r + max(32, r / 2) columns and three iterations where 2 l <= min(m, d), else by a
thin SVD.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from measure import synchronized

from tlora.linalg.products import multiplies_narrow, product


def operations(shape: Any, ranks: Mapping[str, int], by_outputs: bool) -> dict[str, float]:
    """Return the operations of each stage that has any, for a Llama without grouped heads.

    Args:
        shape: `models.Shape`.
        ranks: of each adapted module, by its full name.
        by_outputs: whether W C of down projections came from their outputs, without C.
    """
    hidden, wide, layers = shape.hidden, shape.intermediate, shape.layers
    tokens = shape.samples * shape.tokens
    kinds = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden)),
        **dict.fromkeys(("gate_proj", "up_proj"), (wide, hidden)),
        "down_proj": (hidden, wide),
    }
    weights = layers * sum(m * d for m, d in kinds.values()) + hidden * shape.vocabulary
    # Scores and their product with the values, forward; twice that backward.
    attention = 3 * 4 * tokens * shape.tokens * hidden * layers
    inputs = layers * [hidden, hidden, hidden]  # of q, k and v, of o, of gate and up
    if not by_outputs:
        inputs += layers * [wide]
    modules = [(m, d) for m, d in kinds.values() for _ in range(layers)]
    shared = [(*kinds[name.rsplit(".", 1)[-1]], rank) for name, rank in ranks.items()]

    def inner(d: int) -> int:
        return tokens if 2 * tokens <= d or (by_outputs and d == wide) else d

    return {
        # Forward, and back to the activations: no gradient of a weight.
        "passes": 4.0 * tokens * weights + attention,
        "moments": float(sum(tokens * d * d for d in inputs if 2 * tokens > d)),
        # A product a sample, then |W| . |G|.
        "sensitivities": float(sum(2 * m * d * (tokens + shape.samples) for m, d in modules)),
        "W C": float(sum(2 * m * d * inner(d) for m, d in modules)),
        "factorizations": sum(factorization(m, d, rank) for m, d, rank in shared),
    }


def factorization(m: int, d: int, rank: int) -> float:
    """Return the operations of finding the leading right singular vectors of an m x d matrix."""
    small, width, rounds = min(m, d), rank + max(32, rank // 2), 3
    if small < 256 or 2 * width > small:
        return 4.0 * m * d * small + 8.0 * small**3
    products = 2.0 * m * d * width * (2 * rounds + 2)
    # Orthonormal columns cost 4 k l^2, a triangle alone half of it, its SVD about 12 l^3.
    bases = 4.0 * width**2 * ((rounds + 1) * d + rounds * m) + 2.0 * m * width**2
    return products + bases + 12.0 * width**3 + 2.0 * d * width * rank


def peaks(device: str) -> dict[str, float]:
    """Return the operations a second of the fastest large products of a device, by dtype."""
    size = 8192 if device == "cuda" else 1536
    found = {"float32": _best(size, torch.float32, device)}
    if multiplies_narrow(torch.device(device)):
        found["bfloat16"] = _best(size, torch.bfloat16, device)
    return found


def _best(size: int, dtype: torch.dtype, device: str) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronized(device)
        start = time.perf_counter()
        product(left, right)
        synchronized(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
