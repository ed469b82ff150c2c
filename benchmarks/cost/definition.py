"""Sensitivities, second moments and ranks by their definition in float64, for comparison.

Nothing of the library is used. One sample at a time; a module's gradient is formed when that of its
output arrives, and only one is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

TIE = 1e-4


@dataclass
class Measured:
    """What the samples say of each module, by name.

    Attributes:
        sensitivities: S = (1/n) sum_s mean_jk |W_jk G_s,jk|.
        moments: C = (1/n) sum_s (X_s - mean X_s)^T (X_s - mean X_s), d x d float64.
    """

    sensitivities: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)


def measure(model: Any, samples: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Measured:
    """Measure the nn.Linear modules ``names``; passes run in the model's dtype, sums in float64.

    Args:
        model: in eval mode; of float64 for the definition itself.
        samples: batches of one sample without padding, with labels.
        names: full names of modules that run once a sample.
    """
    found = Measured(dict.fromkeys(names, 0.0))
    asked = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    # The gradient needs somewhere to go back to: the embeddings.
    model.enable_input_require_grads()
    hooks = [
        model.get_submodule(name).register_forward_hook(_recorder(found, name, len(samples)))
        for name in names
    ]
    try:
        for sample in samples:
            model(**sample).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.disable_input_require_grads()
        for parameter, flag in zip(model.parameters(), asked, strict=True):
            parameter.requires_grad_(flag)
    return found


def _recorder(found: Measured, name: str, count: int) -> Any:
    def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        centered = x - x.mean(dim=0)
        added = (centered.T @ centered).div_(count)
        found.moments[name] = found.moments[name].add_(added) if name in found.moments else added

        def weigh(delta: Tensor) -> None:
            gradient = delta.reshape(-1, delta.shape[-1]).double().T @ x
            value = gradient.mul_(module.weight.detach().double()).abs_().mean()
            found.sensitivities[name] += value.item() / count

        output.register_hook(weigh)

    return record


def share_ranks(
    sensitivities: Mapping[str, float], r: int, bounds: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, int], list[str]]:
    """Return the ranks, and the names whose share lies within 1e-4 of where rounding turns.

    r_i = round(N r S_i / sum S); the largest rank takes each missing or surplus one in turn.
    Where that breaks a bound, r_i = round(clamp(c S_i, low_i, high_i)) with the c that spends the
    budget, and the same among those that can still move.

    Args:
        sensitivities: S_i by name.
        r: base rank.
        bounds: the least and the largest rank of each module.
    """
    total, budget = sum(sensitivities.values()), len(sensitivities) * r
    ideal = {name: budget * value / total for name, value in sensitivities.items()}
    free = dict.fromkeys(sensitivities, (0, budget))
    ranks = _settled(ideal, budget, free)
    if any(not low <= ranks[name] <= high for name, (low, high) in bounds.items()):
        budget = min(budget, sum(high for _, high in bounds.values()))
        least, most = 0.0, budget / min(value for value in sensitivities.values() if value > 0)
        for _ in range(200):
            level = (least + most) / 2
            ideal = {
                name: min(max(level * value, bounds[name][0]), bounds[name][1])
                for name, value in sensitivities.items()
            }
            least, most = (level, most) if sum(ideal.values()) < budget else (least, level)
        ranks = _settled(ideal, budget, bounds)
    tied = [n for n, x in ideal.items() if abs(x - int(x) - 0.5) <= TIE * max(x, 1.0)]
    return ranks, tied


def _settled(
    ideal: Mapping[str, float], budget: int, bounds: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    ranks = {name: round(value) for name, value in ideal.items()}
    while (missing := budget - sum(ranks.values())) != 0:
        step = 1 if missing > 0 else -1
        movable = [n for n in ranks if bounds[n][0] <= ranks[n] + step <= bounds[n][1]]
        ranks[max(movable, key=ranks.__getitem__)] += step
    return ranks


def differing(
    ranks: Mapping[str, int], defined: Mapping[str, int], tied: Sequence[str]
) -> list[str]:
    """Return the names whose rank is not the defined one, but for ties.

    With a tie the correction of the sum may also move the largest rank by as many.
    """
    largest = max(defined.values())
    excused = {n for n in defined if defined[n] >= largest - len(tied)} if tied else set()
    return [
        name
        for name, rank in ranks.items()
        if rank != defined[name] and name not in tied and name not in excused
    ]
