"""The models and samples that are measured on: Llama shapes with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A Llama and what it reads."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    samples: int
    tokens: int
    dtype: str = "float32"

    def build(self, device: str) -> tuple[Any, Any]:
        """Return the model, in eval mode, and its parameters' generator state untouched."""
        import transformers

        heads = max(1, self.hidden // 64)
        config = transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(2048, self.tokens),
            tie_word_embeddings=False,
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).to(getattr(torch, self.dtype)).eval()
        _embed_as_text_does(model.get_input_embeddings().weight)
        return model

    def batches(self, size: int, device: str) -> list[dict[str, Tensor]]:
        """Return the samples in batches of ``size``, without padding; labels are the text."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.samples, self.tokens)
        # A few words are frequent, most are rare, as in text (Zipf's law).
        weights = 1.0 / torch.arange(1, self.vocabulary + 1)
        drawn = torch.multinomial(
            weights, self.samples * self.tokens, replacement=True, generator=generator
        )
        ids = drawn.view(shape).to(device)
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
            for part in ids.split(size)
        ]


@torch.no_grad()
def _embed_as_text_does(weight: Tensor) -> None:
    """Give embeddings a spectrum that falls like k^-1/2, as activations of trained models have.

    With the flat spectrum of random embeddings PEFT's EVA never settles.
    """
    falling = torch.arange(1, weight.shape[1] + 1, device=weight.device).pow(-0.5)
    weight.mul_((falling * (weight.shape[1] / falling.square().sum()).sqrt()).to(weight.dtype))
