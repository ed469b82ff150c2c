"""Model families whose GGUF files are tested against llama.cpp itself.

In some families llama.cpp rotates neighboring entries of a head (2i, 2i + 1), while transformers
rotates entry i with entry i + d/2. Those families store the rows of q and k in another order, both
in the base and in an adapter's B.

Source: llama.cpp, `conversion/` (which families reorder) and `src/llama-adapter.cpp` (the adapter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tlora.errors import ConfigError

if TYPE_CHECKING:
    from gguf import TensorNameMap


@dataclass(frozen=True)
class Family:
    """llama.cpp's storage conventions for a family."""

    architecture: str
    """`general.architecture`, as llama.cpp spells it."""
    reordered: bool = False
    """Whether to reorder the rows of q and k."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Additional configuration fields of this family, with their GGUF names."""
    norm_offset: float = 0.0
    """Value added to norm weights."""
    activation: str = "silu"
    """The activation that llama.cpp computes regardless of the configuration."""
    full_every: int = 0
    """Period of layers with full attention, the others use a window; 0: all are full."""
    transposed: tuple[str, ...] = ()
    """Last name parts of the base's Conv1D modules, whose weights are (d_in, d_out)."""


FAMILIES = {
    "llama": Family("llama", reordered=True),
    "mistral": Family("llama", reordered=True),
    "smollm3": Family("smollm3", reordered=True),
    "granite": Family(
        "granite",
        reordered=True,
        fields={
            "attention_multiplier": "attention_scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family(
        "gemma2",
        fields={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "sliding_window": "sliding_window",
        },
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        full_every=2,
    ),
    "gemma3_text": Family(
        "gemma3",
        fields={"sliding_window": "sliding_window"},
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        full_every=6,
    ),
    "olmo2": Family("olmo2"),
    "cohere": Family("command-r", fields={"logit_scale": "logit_scale"}),
    "phi3": Family(
        "phi3",
        fields={
            "sliding_window": "sliding_window",
            "original_max_position_embeddings": "rope_scaling_orig_ctx_len",
        },
    ),
    "gpt2": Family("gpt2", activation="gelu_new", transposed=("c_attn", "c_proj", "c_fc")),
}
"""Families by the base's `model_type`."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a base.

    Args:
        config: the base's configuration, as in its `config.json`.

    Raises:
        ConfigError: the family has not been tested.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"GGUF export supports {', '.join(FAMILIES)}, not {kind}; export with --format uniform,"
            " and run llama.cpp's convert_lora_to_gguf.py on that folder.",
            "format",
        )
    return FAMILIES[kind]


def untested(what: str) -> ConfigError:
    """Return the error for a base untested with `--base_gguf`."""
    return ConfigError(
        f"{what} is not supported; write the base's GGUF file with llama.cpp's"
        " convert_hf_to_gguf.py, which works with the adapter.",
        "base_gguf",
    )


def name_map(family: Family, config: Mapping[str, Any]) -> TensorNameMap:
    """Return the gguf package's tensor name table for a base."""
    import gguf

    found = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(found[family.architecture], layer_count(config))


def setting(config: Mapping[str, Any], *names: str) -> Any:
    """Return the first of these fields that is set, or None; GPT-2 uses its own names."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def layer_count(config: Mapping[str, Any]) -> int:
    """Return the number of layers."""
    return int(setting(config, "num_hidden_layers", "n_layer"))


def heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of query heads and of key-value heads."""
    queries = int(setting(config, "num_attention_heads", "n_head"))
    return queries, int(setting(config, "num_key_value_heads") or queries)


def reordered(
    rows: torch.Tensor, module: str, family: Family, config: Mapping[str, Any]
) -> torch.Tensor:
    """Return the rows of q or k in llama.cpp's order, and those of other modules unchanged.

    Args:
        rows: (d_out, ...): a weight, a bias or B.
        module: the module's name.
        family: the base's family.
        config: the base's configuration.
    """
    last = module.rpartition(".")[2]
    if not family.reordered or last not in ("q_proj", "k_proj"):
        return rows
    count = heads(config)[last == "k_proj"]
    order = torch.arange(len(rows)).view(count, 2, -1).transpose(1, 2).reshape(-1)
    return rows[order]
