"""Tiny multimodal models of the families that people fine-tune on texts, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from families import DECODER
from support import VOCABULARY, seeded

TEXT = DECODER | {"max_position_embeddings": 256}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2} | {
    "out_hidden_size": 16,
    "patch_size": 4,
}
_IMAGE = {"image_token_id": 159, "image_token_index": 159}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4}


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=TEXT, vision_config=_VISION, mm_tokens_per_image=4, **_IMAGE
    )


def _gemma4() -> Any:
    text = TEXT | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4}
    text |= {"num_kv_shared_layers": 0, "global_head_dim": 8}
    vision = _VISION | {"head_dim": 8, "num_key_value_heads": 2}
    return transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)


def _qwen2_5_vl() -> Any:
    text = TEXT | {"rope_parameters": _rope(1, 1, 2)}
    vision = _QWEN_VISION | {"window_size": 8, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=159, video_token_id=158
    )


def _qwen3_vl() -> Any:
    text = TEXT | {"rope_parameters": _rope(2, 1, 1)}
    vision = _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}
    return transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=159, video_token_id=158
    )


def _llama4() -> Any:
    text = TEXT | {"intermediate_size_mlp": 32, "num_local_experts": 2, "moe_layers": [1]}
    text |= {"attention_chunk_size": 64}
    vision = (
        _VISION
        | {"vision_output_dim": 16, "projector_input_dim": 16}
        | {"projector_output_dim": 16}
    )
    return transformers.Llama4Config(text_config=text, vision_config=vision)


def _mistral3() -> Any:
    text = TEXT | {"model_type": "mistral"}
    vision = _VISION | {"model_type": "pixtral", "head_dim": 8}
    return transformers.Mistral3Config(text_config=text, vision_config=vision, **_IMAGE)


def _llava() -> Any:
    vision = _VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
    return transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=vision, **_IMAGE
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
    "llama4": _llama4,
    "mistral3": _mistral3,
    "llava": _llava,
}


def build(family: str) -> Any:
    """Return a fresh model with the same weights every time."""
    config = CONFIGS[family]()
    auto = transformers.AutoModelForImageTextToText
    return seeded(lambda: auto.from_config(config))
