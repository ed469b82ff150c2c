"""llama.cpp itself, and tiny models of the families whose GGUF files are tested on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import xllamacpp
from tokenizers import decoders, models, pre_tokenizers

from families import Kind
from served import SERVED, Saved, save

ROWS = 320
_WIDER = {"vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
_WIDER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 64}
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gpt2": {"vocab_size": ROWS, "n_embd": 64, "n_layer": 3, "n_head": 4},
    "smollm3": {"num_hidden_layers": 5},  # one of them without positions
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0}
    | {"residual_multiplier": 0.7, "logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.5},
}


class Stirred(Kind):
    """A family whose norms and biases are not all one and zero."""

    def build(self) -> Any:
        """Return the model."""
        model = super().build()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return model


def kind_of(family: str, **fields: Any) -> Kind:
    """Return a family of sizes at which heads, groups of heads and layers all differ."""
    kind = SERVED[family]
    wider = {} if family == "gpt2" else _WIDER
    sizes = kind.fields | wider | _OWN.get(family, {}) | fields
    return Stirred(**vars(replace(kind, fields=sizes)))


def save_with_tokenizer(kind: Kind, folder: Path, **fields: Any) -> Saved:
    """Save a tiny model with a tokenizer, and an adapter of it."""
    saved = save(kind, folder, **fields)
    byte_tokenizer().save_pretrained(saved.base)
    return saved


def byte_tokenizer(steps: Any = None, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and a few merges, which splits text by ``steps`` first."""
    specials = ["<pad>", "<s>", "</s>"]
    merges = [("a", "b"), ("Ġ", "a"), ("1", "2"), ("Ġ", "Ġ"), ("'", "S"), ("!", "!"), ("12", "3")]
    merges += [("123", "4"), ("a", "Ġ"), ("!", "Ċ"), ("Ċ", "Ċ"), ("ĠĠ", "a"), ("b", "1")]
    known = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {token: index for index, token in enumerate(known)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.pre_tokenizer = steps or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


_LETTER = 100
PROMPT = torch.randint(3, 259, (24,), generator=torch.Generator().manual_seed(5)).tolist()


class LlamaCpp:
    """A GGUF base, with an adapter or none, in float32 on one thread."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(base)
        parameters.n_ctx, parameters.n_parallel = 256, 1
        parameters.warmup = parameters.fit_params = parameters.endpoint_slots = False
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(parameters)

    def next_token(self, prompt: list[int] | str = PROMPT, rows: int = ROWS) -> torch.Tensor:
        """Return the log probabilities (rows,) of the next token."""
        # A token that is no whole character is held back with its probabilities, so another one is
        # taken; the probabilities are those without this bias.
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "cache_prompt": False}
        request |= {"n_probs": rows, "logit_bias": [[_LETTER, 1000.0]]}
        answer = self._server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found = torch.full((rows,), torch.nan)
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[each["id"]] = each["logprob"]
        return found


def next_token_of(model: Any, prompt: list[int] = PROMPT) -> torch.Tensor:
    """Return the log probabilities of the next token by transformers and PEFT."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the root mean square of the difference."""
    return float((one - other).square().mean().sqrt())
