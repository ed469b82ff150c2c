"""An adapter.gguf as llama.cpp reads it: s is alpha over the tensor's own rank, 1 where alpha is 0.

Source: llama.cpp, `src/llama-adapter.h` (`get_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlora.adapter.saved import SavedLora
from tlora.errors import AdapterError, listed
from tlora.exporters.gguffamilies import family_of, name_map, reordered

_SIDES = (".lora_a", ".lora_b")


def read(file: Path, meant: SavedLora, config: Mapping[str, Any]) -> SavedLora:
    """Return the LoRA in a GGUF file, under the names of the adapter that it was made from.

    Args:
        file: the GGUF file.
        meant: the adapter; a matrix whose module it lacks keeps its name of GGUF.
        config: the base's configuration, as in its `config.json`.

    Raises:
        AdapterError: the file is damaged, no LoRA, of another architecture, or a matrix has no
            counterpart.
        ConfigError: the base's family has not been tested.
    """
    family = family_of(config)
    found, alpha = _opened(file, family.architecture)
    lone = [n for n in found if not n.endswith(_SIDES) or not _pair(n) <= found.keys()]
    if lone or not found:
        raise AdapterError(
            f"{file}: {listed(lone) or 'nothing'} is not one of A and B of a module; export it"
            " again."
        )
    table = name_map(family, config)
    names = {table.get_name(f"{name}.weight", (".weight",)): name for name in meant.keys}
    tensors: dict[str, Tensor] = {}
    keys, ranks, scales = {}, {}, {}
    for a in (name for name in found if name.endswith(_SIDES[0])):
        stored = a.removesuffix(_SIDES[0])
        module = names.get(stored, stored)
        keys[module] = (a, f"{stored}{_SIDES[1]}")
        ranks[module] = found[a].shape[0]
        scales[module] = alpha or float(ranks[module])
        tensors[a] = found[a]
        b = found[keys[module][1]]
        order = reordered(torch.arange(len(b)), module, family, config)
        tensors[keys[module][1]] = b[order.argsort()]
    fields = {"rank_pattern": ranks, "alpha_pattern": scales}
    return SavedLora(file, fields, tensors, keys)


def _opened(file: Path, architecture: str) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of a GGUF file, and its alpha.

    Raises:
        AdapterError: it is damaged, or no adapter of this architecture.
    """
    import gguf

    try:
        opened = gguf.GGUFReader(file)
        found = {each.name: _tensor(each, gguf) for each in opened.tensors}
        kind, own = (_value(opened, f"general.{name}") for name in ("type", "architecture"))
        alpha = float(_value(opened, "adapter.lora.alpha") or 0.0)
    except Exception as error:  # whatever a damaged file makes of its reader
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise AdapterError(f"{file}: cut off or damaged ({cause}); export it again.") from error
    if kind != "adapter" or own != architecture:
        raise AdapterError(
            f"{file} is a {kind or 'file'} of {own}, no adapter of {architecture}; export the"
            " adapter again."
        )
    return found, alpha


def _pair(name: str) -> set[str]:
    stem = name.rpartition(".")[0]
    return {f"{stem}{side}" for side in _SIDES}


def _value(opened: Any, name: str) -> Any:
    field = opened.get_field(name)
    return field.contents() if field is not None else None


def _tensor(entry: Any, gguf: Any) -> Tensor:
    """Return a tensor as torch has it: llama.cpp lists sizes from the innermost."""
    shape = [int(size) for size in reversed(entry.shape)]
    raw = torch.from_numpy(entry.data.copy())
    if entry.tensor_type == gguf.GGMLQuantizationType.BF16:
        return raw.view(torch.uint8).flatten().view(torch.bfloat16).view(shape)
    if not raw.is_floating_point():
        raise ValueError(f"{entry.name} is of type {entry.tensor_type.name}")
    return raw.view(shape)
