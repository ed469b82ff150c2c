"""`gguf`: one adapter file for llama.cpp and Ollama, with one rank per module.

llama.cpp computes y = W x + (alpha / r) B (A x), with r the number of rows of A, and uses 1 for
alpha / r if alpha is 0. So alpha is 0 here, and B is stored as s B.

Source: llama.cpp, `src/llama-adapter.h` (`get_scale`) and `src/llama-adapter.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tlora.adapter.saved import SavedLora
from tlora.errors import ConfigError, listed
from tlora.exporters.base import Export, Source, in_dtype, refuse, refuse_infinite, scaled
from tlora.exporters.checkpoint import base_folder
from tlora.exporters.gguffamilies import Family, family_of, name_map, reordered
from tlora.models.pretrained import Pretrained

if TYPE_CHECKING:
    from gguf import GGUFWriter

ADAPTER = "adapter.gguf"
BASE = "base.gguf"
MODELFILE = "Modelfile"
_WAY_OUT = "merge it, and convert the merged folder with llama.cpp's convert_hf_to_gguf.py"


class Gguf:
    """Folds scales into B; uses llama.cpp's names and row order."""

    needs: ClassVar[str | None] = "gguf"

    def write(self, source: Source, folder: Path) -> Export:
        """Write the folder; see `Exporter`."""
        lora = source.lora
        refuse(lora, "`gguf`", [*lora.lacks()], _WAY_OUT)
        if not source.base:
            raise ConfigError(f"{lora.path} does not name its base model; give --model.", "model")
        checkpoint = Pretrained(name=source.base, trust_remote_code=source.config.trust_remote_code)
        config = checkpoint.config()
        write_adapter(folder / ADAPTER, lora, config.to_dict(), source.config.dtype)
        if source.config.base_gguf:
            from tlora.exporters.ggufbase import write_base

            write_base(folder / BASE, base_folder(source.base), config)
        (folder / MODELFILE).write_text(modelfile(), encoding="utf-8")
        todo = (
            f"You still need {{folder}}/{BASE}: make it with llama.cpp's convert_hf_to_gguf.py, or"
            " export again with --base_gguf into a new folder."
        )
        largest = max(lora.rank(name) for name in lora.keys)
        return Export([], largest, "" if source.config.base_gguf else todo)


def modelfile() -> str:
    """Return an Ollama Modelfile for the adapter and the base file next to it."""
    return f"FROM ./{BASE}\nADAPTER ./{ADAPTER}\n"


def write_adapter(path: Path, lora: SavedLora, config: Mapping[str, Any], dtype: str) -> None:
    """Write an adapter for llama.cpp to apply to the base's GGUF file.

    Args:
        path: the file.
        lora: the adapter, with plain matrices of linear layers.
        config: the base's configuration, as in its `config.json`.
        dtype: "auto" (the adapter's own), "float32", "float16" or "bfloat16".

    Raises:
        AdapterError: llama.cpp would not apply the matrices of a module, or a value does not fit
            the dtype.
        ConfigError: the base's family has not been tested.
    """
    import gguf

    family = family_of(config)
    names = _stored_names(lora, family, config)
    writer = gguf.GGUFWriter(path, family.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for module, stored in names.items():
            factors = lora.factors(module)
            b = reordered(scaled(factors.b, factors.scale, dtype), module, family, config)
            _add(writer, f"{stored}.lora_a", in_dtype(factors.a, dtype))
            _add(writer, f"{stored}.lora_b", b)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _stored_names(lora: SavedLora, family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the modules' weights in the base's GGUF file.

    Norms are vectors, and a tied head is the embedding, whose factors have another layout in
    llama.cpp.

    Raises:
        AdapterError: llama.cpp would not apply the matrices of a module.
    """
    table = name_map(family, config)
    names = {name: table.get_name(f"{name}.weight", (".weight",)) or "" for name in lora.keys}
    is_tied = config.get("tie_word_embeddings", False)
    unread = [
        name
        for name, stored in names.items()
        if not stored.startswith("blk.") and (is_tied or stored != "output.weight")
    ]
    if unread:
        refuse(lora, "`gguf`", [f"matrices of {listed(unread)}"], _WAY_OUT)
    return names


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Add a matrix in float32, float16, or bfloat16, which numpy lacks."""
    import gguf

    refuse_infinite({name: tensor})
    tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        raw = tensor.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())
