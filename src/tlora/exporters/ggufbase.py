"""`--base_gguf`: write the base as a GGUF file, so that llama.cpp and Ollama need nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tlora import files
from tlora.errors import ConfigError
from tlora.exporters.checkpoint import Stored, stored_tensors
from tlora.exporters.gguffamilies import (
    Family,
    family_of,
    heads,
    layer_count,
    name_map,
    reordered,
    setting,
    untested,
)
from tlora.exporters.gguftokens import add_tokens
from tlora.models.pretrained import readable

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file, read just before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def write_base(
    path: Path, folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float16
) -> None:
    """Write a base as a GGUF file, with one tensor in memory at a time.

    Args:
        path: the file.
        folder: the base in Hugging Face's format, with a `tokenizer.json`.
        config: its configuration.
        dtype: float16, or float32 without rounding; vectors are always float32.

    Raises:
        ConfigError: this kind of base or tokenizer is not tested.
    """
    import gguf
    import numpy

    fields = config.to_dict()
    family = family_of(fields)
    if fields.get("quantization_config"):
        raise untested("a quantized base")
    with readable(str(folder), "model"):
        _refuse_other_constants(family, fields)
        entries = [*_rope_factors(config), *_weights(folder, family, fields, dtype)]
    with files.replacing_file(path) as part:
        writer = gguf.GGUFWriter(part, family.architecture)
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            with readable(str(folder), "model"):
                _add_sizes(writer, family, fields)
                add_tokens(writer, folder, fields["vocab_size"])
            for entry in entries:
                kind = numpy.dtype(str(entry.dtype).removeprefix("torch."))
                size = numpy.prod(entry.shape, dtype=int) * kind.itemsize
                writer.add_tensor_info(entry.name, entry.shape, kind, int(size))
            writer.write_header_to_file()
            _write_fields(writer, folder)
            writer.write_ti_data_to_file()
            for entry, tensor in _tensors(folder, entries):
                if not tensor.isfinite().all():
                    raise untested(f"a base with values beyond float16 ({entry.name})")
                writer.write_tensor_data(tensor.contiguous().numpy())
        finally:
            writer.close()


def _tensors(folder: Path, entries: Iterable[_Entry]) -> Iterator[tuple[_Entry, torch.Tensor]]:
    with readable(str(folder), "model"):
        for entry in entries:
            yield entry, entry.read().to(entry.dtype)


def _write_fields(writer: GGUFWriter, folder: Path) -> None:
    try:
        writer.write_kv_data_to_file()
    except struct.error as error:
        raise ConfigError(
            f"{folder / 'config.json'} has a size below 0 or beyond 32 bits, which GGUF cannot"
            " hold; correct it, or copy the file again.",
            where="model",
        ) from error


def _add_sizes(writer: GGUFWriter, family: Family, config: Mapping[str, Any]) -> None:
    """Add the sizes and constants from which llama.cpp builds the model."""
    queries, keys = heads(config)
    width = setting(config, "hidden_size", "n_embd")
    head = setting(config, "head_dim") or width // queries
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_block_count(layer_count(config))
    writer.add_context_length(setting(config, "max_position_embeddings", "n_positions"))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(setting(config, "intermediate_size", "n_inner") or 4 * width)
    writer.add_head_count(queries)
    writer.add_head_count_kv(keys)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config["vocab_size"])
    if epsilon := setting(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(epsilon)
    if epsilon := setting(config, "layer_norm_eps", "layer_norm_epsilon"):
        writer.add_layer_norm_eps(epsilon)
    if rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    for name, known in family.fields.items():
        if (value := setting(config, name)) is not None:
            getattr(writer, f"add_{known}")(value)


def _refuse_other_constants(family: Family, config: Mapping[str, Any]) -> None:
    """Reject a base whose constants differ from llama.cpp's built-in ones for its family.

    Raises:
        ConfigError: llama.cpp would load the file but compute something else.
    """
    layers, width = range(1, layer_count(config) + 1), setting(config, "hidden_size", "n_embd")
    count = heads(config)[0]
    head = setting(config, "head_dim") or width // count
    kinds = [
        "full_attention" if i % (family.full_every or 1) == 0 else "sliding_attention"
        for i in layers
    ]
    rope = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    # llama.cpp identifies the largest Gemmas by their layers, and divides by head width there.
    largest = len(layers) == {2: 46, 6: 62}.get(family.full_every)
    known: dict[str, Any] = {
        "hidden_act": family.activation,
        "hidden_activation": family.activation,
        "activation_function": family.activation,
        "query_pre_attn_scalar": width // count if largest else head,
        "no_rope_layers": [int(i % 4 != 0) for i in layers],
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    }
    if family.full_every:
        known["layer_types"] = kinds
    for name, right in known.items():
        if config.get(name, right) not in (right, None):
            raise untested(f"a base with `{name}: {config[name]}`, where llama.cpp uses {right},")
    if rope.get("rope_theta", _LOCAL) != _LOCAL:
        raise untested(f"a base with a sliding window `rope_theta` of {rope['rope_theta']}")


_LOCAL = 10_000


def _rope_factors(config: PretrainedConfig) -> list[_Entry]:
    """Return the frequency divisors of Llama 3's rotary positions.

    Raises:
        ConfigError: the frequencies change in another way.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("full_attention", rope).get("rope_type", "default")
    if kind == "default":
        return []
    if kind != "llama3":
        raise untested(f"a base with rotary positions of type {kind}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    changed, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(changed)) / len(changed))
    factors = plain / changed
    return [_Entry("rope_freqs.weight", (len(factors),), torch.float32, lambda: factors)]


def _weights(
    folder: Path, family: Family, config: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[_Entry]:
    """Yield the tensors of a base with their names in the GGUF file.

    Raises:
        ConfigError: the base has tensors unknown in its family.
    """
    table = name_map(family, config)
    seen = set()
    stored = [each for tensors in stored_tensors(folder).values() for each in tensors.values()]
    if not stored:
        raise untested("a base without safetensors files")
    for each in stored:
        if each.key.endswith((".attn.bias", ".attn.masked_bias")):  # GPT-2's causal masks
            continue
        found = table.get_name(each.key, (".weight", ".bias"))
        if each.key == "lm_head.weight" and config.get("tie_word_embeddings", False):
            found = "token_embd.weight"  # files have either or both names
        if found is None:
            raise untested(f"a base with a tensor {each.key}")
        if found in seen:
            continue
        seen.add(found)
        is_matrix = len(each.shape) == 2 and not found.startswith("position_embd")
        yield _Entry(
            found,
            each.shape[::-1] if _is_turned(each, family) else each.shape,
            dtype if is_matrix else torch.float32,
            partial(_read, each, family, config),
        )


def _is_turned(stored: Stored, family: Family) -> bool:
    return len(stored.shape) == 2 and stored.key.split(".")[-2] in family.transposed


def _read(stored: Stored, family: Family, config: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor of the base as llama.cpp stores it, in float32."""
    tensor = stored.read().float()
    module = stored.key.rpartition(".")[0]
    if _is_turned(stored, family):
        return tensor.T
    if module.endswith("norm"):
        return tensor + family.norm_offset
    return reordered(tensor, module, family, config)
