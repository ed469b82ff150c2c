"""Task-aware LoRA in one file: read this first.

LoRA adapts a linear layer y = W x as y = W x + s B A x. Before training, Task-aware LoRA computes
from a few samples of the task, for each layer i:

    A_i   the leading right singular vectors of W_i C_i, where C_i is the second moment of the
          layer's inputs; A is frozen and only B trains
    r_i   its rank, in proportion to the layer's sensitivity S_i
    s_i   its scale, in the same way

This is the rule of the paper and its released code (arXiv 2604.18124) in its simplest form: samples
come one at a time, all targeted weights have a gradient at the same time, every layer keeps its own
second moment, and the SVD returns full factors. The library computes the same ranks, scales and
subspaces in less time and memory (docs/cost.md), for more models, from padded batches.

    python examples/tlora_in_one_file.py [MODEL]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

Sample = Mapping[str, Tensor]


def initialize(model: nn.Module, samples: Sequence[Sample], names: Sequence[str], r: int) -> Any:
    """Calibrate on the samples, plan and attach; return a `PeftModel` whose output is the base's.

    Args:
        model: the base model.
        samples: batches of one sample without padding, with the labels of training.
        names: full names of the nn.Linear modules to adapt.
        r: base rank; also base alpha.
    """
    sensitivities, moments = calibrate(model, samples, names)
    ranks = share_ranks(sensitivities, r)
    scales = share_scales(sensitivities, r)
    bases = {}
    for name in names:
        # A second moment is freed once its layer is solved.
        weight, moment = model.get_submodule(name).weight, moments.pop(name)
        bases[name] = task_subspace(weight, moment, ranks[name])
    return attach(model, bases, scales, r)


# --- 1. Calibrate: one forward and one backward pass for each sample


def calibrate(
    model: nn.Module, samples: Sequence[Sample], names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return two dicts by module name, means over the n samples.

    S = (1/n) sum_s mean_jk |W_jk (dL_s/dW)_jk|: sensitivity of the loss to the layer.
    C = (1/n) sum_s (X_s - mean X_s)^T (X_s - mean X_s), d x d: second moment of its inputs, with
    X_s (tokens x d) the inputs for sample s, centered over the sample's tokens.
    """
    layers = {name: model.get_submodule(name) for name in names}
    sensitivities = {name: layer.weight.new_zeros(()).float() for name, layer in layers.items()}
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            x = x - x.mean(dim=0)
            moments[name] = moments[name] + x.T @ x if name in moments else x.T @ x

        return add

    model.eval().requires_grad_(False)  # eval: no dropout
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for sample in samples:
            model.zero_grad(set_to_none=True)
            model(**sample).loss.backward()
            for name, layer in layers.items():
                # The absolute value of each sample's own gradient, not of their mean.
                sensitivities[name] += (layer.weight.detach() * layer.weight.grad).abs().mean()
    finally:
        for hook in hooks:
            hook.remove()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    for total in [*sensitivities.values(), *moments.values()]:
        total.div_(len(samples))
    return sensitivities, moments


# --- 2. Plan: ranks, scales and subspaces


def share_ranks(sensitivities: Mapping[str, Tensor], r: int) -> dict[str, int]:
    """r_i = round(N r S_i / sum S); rounding errors are fixed at the largest layers, one by one."""
    values = {name: float(value) for name, value in sensitivities.items()}
    budget, total = len(values) * r, sum(values.values())
    ranks = {name: round(budget * value / total) for name, value in values.items()}
    while (missing := budget - sum(ranks.values())) != 0:
        largest = max(ranks, key=lambda name: ranks[name])
        ranks[largest] += 1 if missing > 0 else -1
    return ranks


def share_scales(sensitivities: Mapping[str, Tensor], r: int) -> dict[str, float]:
    """s_i = max(alpha, round(N alpha S_i / sum S)) / r with alpha = r: never lowered."""
    total = sum(float(value) for value in sensitivities.values())
    budget = len(sensitivities) * r
    return {n: max(r, round(budget * float(s) / total)) / r for n, s in sensitivities.items()}


def task_subspace(weight: Tensor, moment: Tensor, rank: int) -> Tensor:
    """A = V_r^T of W C = U S V^T: the input directions that the layer and the task use most."""
    _, _, vectors = torch.linalg.svd(weight.detach().float() @ moment)
    return vectors[:rank].clone()


# --- 3. Attach: a stock PEFT adapter


def attach(
    model: nn.Module, bases: Mapping[str, Tensor], scales: Mapping[str, float], r: int
) -> Any:
    """Wrap the layers with PEFT, set and freeze A; PEFT initializes B to zero.

    PEFT scales by alpha_i / r_i, so alpha_i = s_i r_i. Layers of rank 0 are skipped.
    """
    used = {name: basis for name, basis in bases.items() if len(basis)}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(used),
        rank_pattern={f"^{re.escape(name)}": len(basis) for name, basis in used.items()},
        alpha_pattern={f"^{re.escape(n)}": scales[n] * len(basis) for n, basis in used.items()},
    )
    adapted = get_peft_model(model, config)
    for name, basis in used.items():
        layer = adapted.base_model.model.get_submodule(name).lora_A["default"]
        layer.weight.data.copy_(basis)
        layer.weight.requires_grad_(False)
    return adapted


# --- Try it


def main() -> None:
    """Adapt a model (by default, the one shipped with tlora) to four texts, and print the plan."""
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = sys.argv[1] if sys.argv[1:] else str(files("tlora.demo") / "base")
    model, tokenizer = (c.from_pretrained(path) for c in (AutoModelForCausalLM, AutoTokenizer))
    texts = ["12+30=42", "7 apples and 5 more are 12.", "The sum of 3 and 4 is 7.", "90-15=75"]
    samples = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        samples.append({"input_ids": tokens, "labels": tokens})
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    weights = {name: model.get_submodule(name).weight.detach().float() for name in names}
    _, moments = calibrate(model, samples, names)

    adapted = initialize(model, samples, names, r=8)

    print("rank scale energy  (energy: the fraction of ||W C||^2 captured by A)")
    for name in names:
        layer = adapted.base_model.model.get_submodule(name)
        if not hasattr(layer, "lora_A"):
            print(f"   0     -      -  {name}")
            continue
        product, a = weights[name] @ moments[name], layer.lora_A["default"].weight
        energy = ((product @ a.T).norm() / product.norm()).square().item()
        print(f"{len(a):4} {layer.scaling['default']:5.2f} {energy:6.3f}  {name}")
    adapted.print_trainable_parameters()


if __name__ == "__main__":
    main()
