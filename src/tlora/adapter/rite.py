"""LoRA-RITE: an optimizer whose steps do not depend on the factorization of a low-rank product.

(M A, B M^-1) has the same product as (A, B) for every invertible M. AdamW updates the two products
differently; this optimizer updates them equally.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from tlora.adapter.freeze import lora_layers
from tlora.calibration.placement import by_deepspeed, is_sharded
from tlora.errors import ConfigError


class LoraRite(torch.optim.AdamW):
    """AdamW, except for groups with `pairs`, whose parameters are A_1, B_1, A_2, B_2, and so on.

    Let X (n x r) be a factor, B or A^T, Y the other one, and Y = U R its QR decomposition. At step
    t, with the decays b1 and b2 corrected for bias (b (1 - b^(t-1)) / (1 - b^t)):

        g   = (dL/dX) R^+                                    the unmagnified gradient
        P   = U^T U_(t-1)                                    from the last step's basis to this one
        rho = b2 (rho + max_i (l_i(V) - l_i(P V P^T)))       what the new basis misses of V
        V   = b2 P V P^T + (1 - b2) g^T g / n
        M   = b1 M P^T + (1 - b1) g (V + rho I)^(-1/2)
        X   = X - lr M R^(+T)

    l_i are eigenvalues in order, and R^+ is the pseudoinverse: while B is zero, A does not change.
    Both factors step from their values before the step. If A is frozen, only B steps. State is kept
    in the parameters' dtype, float32 at least.

    Args:
        groups: of parameters; a group with `pairs` true holds LoRA factors A (r x d) and B (m x r),
            alternating.
        lr, betas, weight_decay: as AdamW's.
        rite_eps: added to the root of each eigenvalue of V + rho I before inversion.

    Source: Yen et al., arXiv 2410.20625, section 3.2 (averages and their divisors: its code).
    """

    def __init__(self, groups: list[dict[str, Any]], rite_eps: float = 1e-6, **fields: Any) -> None:
        super().__init__(groups, **fields)
        for group in self.param_groups:
            group.setdefault("pairs", False)
            group["rite_eps"] = rite_eps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; that of the pairs keeps its own dtype, which may be wider than theirs."""
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, factor in zip(saved["params"], group["params"], strict=True):
                if group["pairs"] and index in state_dict["state"]:
                    own = self.state[factor]
                    for name, value in state_dict["state"][index].items():
                        own[name] = value.to(own[name].device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; it overwrites the gradients of the pairs."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["pairs"]:
                self._move(group)
        super().step()
        return loss

    def _move(self, group: dict[str, Any]) -> None:
        """Step the pairs of a group, batching factors of equal size: few launches on a GPU."""
        alike: dict[Any, list[_Half]] = {}
        for a, b in zip(group["params"][::2], group["params"][1::2], strict=True):
            for factor, x, y in ((b, b, a.T), (a, a.T, b)):
                if factor.grad is not None:
                    gradient = factor.grad if factor is b else factor.grad.T
                    half = _Half(factor, x, y, gradient, self.state[factor])
                    alike.setdefault((x.shape, y.shape, x.device, x.dtype), []).append(half)
        moves = [(halves, _steps(halves, group)) for halves in alike.values()]
        for halves, steps in moves:  # once all are known: neither factor sees the other's step
            for half, step in zip(halves, steps, strict=True):
                half.x.mul_(1 - group["lr"] * group["weight_decay"])
                half.x.sub_(step.to(half.x.dtype), alpha=group["lr"])
                half.factor.grad = None  # AdamW skips it


class _Half(NamedTuple):
    """A factor to step: X as a view of it, Y, dL/dX and its state."""

    factor: Tensor
    x: Tensor
    y: Tensor
    gradient: Tensor
    state: dict[str, Any]


def _steps(halves: Sequence[_Half], group: dict[str, Any]) -> Tensor:
    """Return the update of each X, N x n x r, and update the states."""
    wide = torch.promote_types(halves[0].x.dtype, torch.float32)
    basis, magnitude = torch.linalg.qr(torch.stack([half.y for half in halves]).to(wide))
    inverse = torch.linalg.pinv(magnitude)
    g = torch.stack([half.gradient for half in halves]).to(wide) @ inverse
    states = [half.state for half in halves]
    for state in states:
        if not state:
            rank = basis.shape[-1]
            state |= {"step": torch.zeros(()), "first": torch.zeros_like(g[0])}
            state |= {"second": g.new_zeros(rank, rank), "escaped": g.new_zeros(1, 1)}
            state["basis"] = torch.zeros_like(basis[0])
        state["step"] += 1
    first, second, escaped, before = (
        torch.stack([state[name] for state in states])
        for name in ("first", "second", "escaped", "basis")
    )
    decay1, decay2 = (
        g.new_tensor([_unbiased(beta, float(state["step"])) for state in states])[:, None, None]
        for beta in group["betas"]
    )
    turn = basis.mT @ before
    moved = turn @ second @ turn.mT
    lost = torch.linalg.eigvalsh(second) - torch.linalg.eigvalsh(moved)
    escaped = decay2 * (escaped + lost.amax(dim=-1).clamp_min(0)[:, None, None])
    second = _symmetric(decay2 * moved + (1 - decay2) * (g.mT @ g) / g.shape[-2])
    values, vectors = torch.linalg.eigh(second)
    roots = (values.clamp_min(0)[:, None] + escaped).sqrt() + group["rite_eps"]
    scaled = g @ (vectors / roots) @ vectors.mT
    first = decay1 * first @ turn.mT + (1 - decay1) * scaled
    for place, state in enumerate(states):
        for name, value in (("first", first), ("second", second), ("escaped", escaped)):
            state[name] = value[place].clone()
        state["basis"] = basis[place].clone()
    moves: Tensor = first @ inverse.mT
    return moves


def _unbiased(beta: float, step: float) -> float:
    return float(beta * (1 - beta ** (step - 1)) / (1 - beta**step))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def make_rite(model: nn.Module, arguments: Any, eps: float = 1e-6) -> LoraRite:
    """Make the optimizer of an adapted model; parameters other than A and B get AdamW.

    As in the trainer's own optimizer, one-dimensional parameters have no weight decay.

    Args:
        model: has LoRA layers.
        arguments: transformers' training arguments; uses `learning_rate`, `adam_beta1`,
            `adam_beta2`, `adam_epsilon` (AdamW's) and `weight_decay`.
        eps: see `LoraRite`.

    Raises:
        ConfigError: there is no pair A, B, or a pair is sharded or belongs to fused experts.
    """
    if is_sharded(model) or by_deepspeed(arguments):
        raise ConfigError(
            "LoRA-RITE needs each A and B whole, and FSDP2 and DeepSpeed shard them; "
            "launch the run with DDP, or choose another optimizer.",
            where="trainer",
        )
    factors = _factors(model)
    paired = set(map(id, factors))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
    wide, narrow = [p for p in others if p.dim() > 1], [p for p in others if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": factors, "pairs": True}]
    groups += [{"params": wide}] if wide else []
    groups += [{"params": narrow, "weight_decay": 0.0}] if narrow else []
    return LoraRite(
        groups,
        rite_eps=eps,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )


def _factors(model: nn.Module) -> list[Tensor]:
    """Return A_1, B_1, A_2, B_2, and so on; a frozen A is included.

    Raises:
        ConfigError: there is no pair, or a pair belongs to fused experts.
    """
    factors: list[Tensor] = []
    for name, layer in lora_layers(model):
        if isinstance(layer, ParamWrapper):
            raise ConfigError(
                f"{name} adapts fused experts, whose A and B are not a single pair, and "
                "LoRA-RITE steps pairs; remove `target_parameters`, or choose another "
                "optimizer.",
                where="trainer",
            )
        a, b = _trained(layer.lora_A["default"]), _trained(layer.lora_B["default"])
        if a is not None and b is not None and b.requires_grad:
            factors += [a, b]
    if not factors:
        raise ConfigError(
            "LoRA-RITE steps the factors A and B of a plain LoRA, and this method trains none;"
            " choose another optimizer.",
            where="trainer",
        )
    return factors


def _trained(held: nn.Module) -> Tensor | None:
    """Return the matrix of a plain A or B, or of the newest link of a chain."""
    found: Tensor | None = held.weight if type(held) is nn.Linear else getattr(held, "newest", None)
    return found
