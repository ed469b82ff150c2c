"""Tiny models with fused experts, and an independent definition of their statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import silu

from support import VOCABULARY, Sample, as_double, seeded

EXPERTS = 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(**overrides: Any) -> Any:
    config = transformers.MixtralConfig(**(SHAPE | {"num_local_experts": EXPERTS} | overrides))
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def qwen3(**overrides: Any) -> Any:
    """The first layer is dense, with the names that experts had before they were fused."""
    fields = {"num_experts": EXPERTS, "moe_intermediate_size": 8, "head_dim": 4}
    fields |= {"decoder_sparse_step": 2}
    config = transformers.Qwen3MoeConfig(**(SHAPE | fields | overrides))
    return seeded(lambda: transformers.Qwen3MoeForCausalLM(config))


def qwen2(**overrides: Any) -> Any:
    fields = {"num_experts": EXPERTS, "moe_intermediate_size": 8}
    fields |= {"shared_expert_intermediate_size": 20}
    config = transformers.Qwen2MoeConfig(**(SHAPE | fields | overrides))
    return seeded(lambda: transformers.Qwen2MoeForCausalLM(config))


def gpt_oss(**overrides: Any) -> Any:
    """Matrices stored as d x m, biases, gate and up interleaved, both clamped."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    fields = {"num_local_experts": EXPERTS, "head_dim": 4, "rope_parameters": rope}
    config = transformers.GptOssConfig(**(SHAPE | fields | overrides))

    def build() -> Any:
        model = transformers.GptOssForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return seeded(build)


MODELS: dict[str, Callable[..., Any]] = {
    "mixtral": mixtral,
    "qwen3": qwen3,
    "qwen2": qwen2,
    "gpt_oss": gpt_oss,
}


def fused(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def as_matrix(model: Any, name: str, expert: int) -> Tensor:
    """W_e as m x d."""
    matrix = model.get_parameter(name).detach()[expert]
    return matrix.T if "GptOss" in type(model).__name__ else matrix


@dataclass
class Expected:
    """docs/method.md, 8, in float64: of one parameter."""

    sensitivity: float
    covariance: list[Tensor]
    tokens: list[int]


def one_at_a_time(model: Any, samples: Sequence[Sample]) -> dict[str, Expected]:
    """Follow the definition: one sample at a time, parameters that require a gradient."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    model.config._experts_implementation = "eager"
    names = fused(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for owner in {name.rpartition(".")[0] for name in names}:
        model.get_submodule(owner).register_forward_pre_hook(
            lambda _, args, owner=owner: seen.update({owner: (args[0].detach(), args[1])})
        )
    found = {}
    for name in names:
        parameter = model.get_parameter(name).requires_grad_(True)
        width = as_matrix(model, name, 0).shape[1]
        zeros = [torch.zeros(width, width, dtype=torch.float64) for _ in range(len(parameter))]
        found[name] = Expected(0.0, zeros, [0] * len(parameter))
    for sample in samples:
        model.zero_grad(set_to_none=True)
        model(**as_double(sample)).loss.backward()
        for name, expected in found.items():
            parameter = model.get_parameter(name)
            product = (parameter * parameter.grad).abs().mean().item()
            expected.sensitivity += product / len(samples)
            hidden, chosen = seen[name.rpartition(".")[0]]
            for expert in range(len(parameter)):
                x = hidden[(chosen == expert).any(dim=-1)]
                if name.endswith("down_proj"):
                    x = activated(model, name, expert, x)
                expected.tokens[expert] += len(x)
                if len(x):
                    around = x - x.mean(dim=0)
                    expected.covariance[expert] += around.T @ around / len(samples)
    return found


@torch.no_grad()
def activated(model: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """What the expert's down projection reads, by the formula of the model's paper."""
    owner = name.rpartition(".")[0]
    both = x @ as_matrix(model, f"{owner}.gate_up_proj", expert).T
    if "GptOss" not in type(model).__name__:
        gate, up = both.chunk(2, dim=-1)
        return silu(gate) * up
    both = both + model.get_parameter(f"{owner}.gate_up_proj_bias")[expert]
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)
