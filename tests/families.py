"""Tiny models of the families that people fine-tune, with random weights and samples that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

import support
from support import VOCABULARY, Sample

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "init_std": 0.2,
}


@dataclass(frozen=True)
class Kind:
    """A family: its classes by name, what its configuration sets, and its samples."""

    config: str
    model: str
    fields: dict[str, Any]
    samples: Callable[[], Sequence[Sample]] = support.causal_samples
    task_type: str | None = "CAUSAL_LM"
    adapter: dict[str, Any] = field(default_factory=dict)
    """Fields of the adapter's configuration."""
    alone: bool = False
    """Samples are not padded into one batch."""

    def build(self) -> Any:
        """Return a fresh model with the same weights every time."""
        made = getattr(transformers, self.config)(**self.fields)
        return support.seeded(lambda: getattr(transformers, self.model)(made))

    def batches(self) -> list[Sample]:
        """Return the samples, padded into one batch where the family takes padding."""
        samples = list(self.samples())
        return samples if self.alone else [support.padded(samples)]


def heard_samples() -> list[Sample]:
    """Mel spectrograms and transcripts."""
    generator = torch.Generator().manual_seed(8)
    return [
        {
            "input_features": torch.randn(1, 8, 16, generator=generator),
            "labels": torch.randint(3, VOCABULARY, (1, 5), generator=generator),
        }
        for _ in range(3)
    ]


def seen_samples() -> list[Sample]:
    """Images of four tokens within a text."""
    generator = torch.Generator().manual_seed(9)
    samples = []
    for length in (4, 6, 3):
        text = support.ids(length, generator)
        image = torch.full((1, 4), _IMAGE)
        text = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
        labels = text.clone()
        labels[:, :5] = -100
        samples.append(
            {
                "input_ids": text,
                "attention_mask": torch.ones_like(text),
                "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
                "labels": labels,
            }
        )
    return samples


_IMAGE = 159

_LLAVA = {
    "text_config": DECODER | {"model_type": "llama"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 16,
    },
    "image_token_index": _IMAGE,
    "image_token_id": _IMAGE,
    "vision_feature_layer": -2,
}

FAMILIES: dict[str, Kind] = {
    "llama": Kind("LlamaConfig", "LlamaForCausalLM", DECODER),
    "mistral": Kind("MistralConfig", "MistralForCausalLM", DECODER),
    "qwen2": Kind("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": Kind("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "gemma2": Kind("Gemma2Config", "Gemma2ForCausalLM", DECODER),
    "gemma3": Kind("Gemma3TextConfig", "Gemma3ForCausalLM", DECODER),
    "smollm3": Kind("SmolLM3Config", "SmolLM3ForCausalLM", DECODER),
    "olmo2": Kind("Olmo2Config", "Olmo2ForCausalLM", DECODER),
    "phi3": Kind("Phi3Config", "Phi3ForCausalLM", DECODER),
    "gpt-neox": Kind("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER),
    "falcon": Kind(
        "FalconConfig",
        "FalconForCausalLM",
        {k: v for k, v in DECODER.items() if k not in ("head_dim", "intermediate_size")},
    ),
    "gpt2": Kind(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
    ),
    "opt": Kind(
        "OPTConfig",
        "OPTForCausalLM",
        {k: v for k, v in DECODER.items() if k not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.2},
    ),
    "mamba": Kind(
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        # Its weight is read by the mixer, and the module never called.
        adapter={"exclude_modules": ["dt_proj"]},
    ),
    "bert": Kind(
        "BertConfig",
        "BertForSequenceClassification",
        _ENCODER,
        support.classified_samples,
        "SEQ_CLS",
    ),
    "roberta": Kind(
        "RobertaConfig",
        "RobertaForSequenceClassification",
        _ENCODER,
        support.classified_samples,
        "SEQ_CLS",
    ),
    "deberta-v2": Kind(
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        _ENCODER
        | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        support.classified_samples,
        "SEQ_CLS",
    ),
    "albert": Kind(
        "AlbertConfig",
        "AlbertForSequenceClassification",
        _ENCODER | {"embedding_size": 8},
        support.classified_samples,
        "SEQ_CLS",
    ),
    "distilbert": Kind(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
        | {"max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2},
        support.classified_samples,
        "SEQ_CLS",
    ),
    "t5": Kind(
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2}
        | {"num_heads": 2, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
        | {"initializer_factor": 1.5, "feed_forward_proj": "gated-gelu"},
        support.translated_samples,
        "SEQ_2_SEQ_LM",
    ),
    "bart": Kind(
        "BartConfig",
        "BartForConditionalGeneration",
        _SEQ2SEQ | {"max_position_embeddings": 64},
        support.translated_samples,
        "SEQ_2_SEQ_LM",
    ),
    "whisper": Kind(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        _SEQ2SEQ
        | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
        | {"suppress_tokens": [], "begin_suppress_tokens": []},
        heard_samples,
        None,
    ),
    "vit": Kind(
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_labels": 2}
        | {"initializer_range": 0.2},
        support.image_samples,
        None,
    ),
    "llava": Kind(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        _LLAVA,
        seen_samples,
        None,
        {"target_modules": r".*(_proj|fc\d|linear_\d)"},
    ),
    "llava-language": Kind(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        _LLAVA,
        seen_samples,
        None,
    ),
}
