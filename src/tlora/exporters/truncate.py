"""Truncate a LoRA to rank at most R per module by SVD of each update.

s B A = Q_B (R_B R_A^T) Q_A^T by QR of B and A^T, so the SVD is of an r x r matrix and the product
of d_out x d_in is never formed. Truncation at R is the best rank-R approximation in the Frobenius
norm (Eckart and Young, 1936); the lost energy is the sum of the squared singular values beyond R.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.adapter.saved import Factors, SavedLora


@dataclass(frozen=True)
class Cut:
    """Loss due to truncation.

    Attributes:
        lost: lost fraction of the squared Frobenius norm of each module's update, by name.
        in_all: lost fraction of the sum over all modules.
        nested: whether ranks that were trained for truncation were cut, so that nothing trained is
            lost.
    """

    lost: dict[str, float]
    in_all: float
    nested: bool = False


def spectrum(factors: Factors) -> Tensor:
    """Return the r singular values of s B A, in descending order, float64."""
    _, core, _ = small(factors)
    return torch.linalg.svdvals(core)


def truncated(lora: SavedLora, rank: int) -> tuple[SavedLora, Cut]:
    """Truncate the LoRA to at most ``rank`` in each module, and return the lost energy too.

    Smaller modules stay unchanged. Truncated ones have orthonormal rows in A and their scale folded
    into B; matrices are computed in float64 and rounded to their dtype. Nested ranks keep the first
    ones, at the scale lora_alpha / rank, as trained.

    Args:
        lora: a LoRA on linear layers.
        rank: maximum rank of each module.
    """
    tensors = {key: lora.tensors[key] for key in lora.others}
    ranks, alphas, lost, energies = {}, {}, {}, {}
    nested = False
    for name, (a, b) in lora.keys.items():
        factors = lora.factors(name)
        tensors[a], tensors[b] = factors.a, factors.b
        ranks[name], alphas[name] = factors.rank, factors.scale * factors.rank
        energy = spectrum(factors).square()
        energies[name] = float(energy.sum())
        lost[name] = 0.0
        if factors.rank > rank and lora.nested:
            tensors[a], tensors[b] = factors.a[:rank], factors.b[:, :rank]
            ranks[name], nested = rank, True
        elif factors.rank > rank:
            lost[name] = float(energy[rank:].sum()) / energies[name] if energies[name] else 0.0
            tensors[a], tensors[b] = _cut(factors, rank)
            ranks[name] = len(tensors[a])  # less than `rank` in a smaller layer
            alphas[name] = float(ranks[name])
    whole = sum(energies.values())
    in_all = sum(lost[name] * energies[name] for name in lost) / whole if whole else 0.0
    fields = lora.fields | {
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(name)}": each for name, each in ranks.items()},
        "alpha_pattern": {f"^{re.escape(name)}": each for name, each in alphas.items()},
    }
    made = dataclasses.replace(lora, fields=fields, tensors=tensors)
    return made, Cut(lost, in_all, nested)


def _cut(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    q_b, core, q_a = small(factors)
    u, values, v = torch.linalg.svd(core)
    a = v[:rank] @ q_a.T
    b = q_b @ (u[:, :rank] * values[:rank])
    return a.to(factors.a.dtype), b.to(factors.b.dtype)


def small(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q_B, s R_B R_A^T and Q_A, in float64."""
    q_b, r_b = torch.linalg.qr(factors.b.double().flatten(1))
    q_a, r_a = torch.linalg.qr(factors.a.double().flatten(1).T)
    return q_b, factors.scale * r_b @ r_a.T, q_a
