"""Read an adapter.gguf as llama.cpp does: s is alpha over the tensor's rank, or 1 if alpha is 0.

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
    """Return the LoRA in a GGUF file, with the names of the original adapter.

    Args:
        file: the GGUF file.
        meant: the adapter; a matrix without a counterpart keeps its GGUF name.
        config: the base's configuration, as in its `config.json`.

    Raises:
        AdapterError: the file is damaged, not a LoRA or for another architecture, or a matrix
            has no counterpart.
        ConfigError: the base's family has not been tested.
    """
    family = family_of(config)
    found, alpha = _opened(file, family.architecture)
    lone = [n for n in found if not n.endswith(_SIDES) or not _pair(n) <= found.keys()]
    if lone or not found:
        raise AdapterError(
            f"{file}: A or B is missing for {listed(lone) or 'all modules'}; export it again."
        )
    _check_shapes(file, found)
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


def _check_shapes(file: Path, found: Mapping[str, Tensor]) -> None:
    """Check that each A (r x d) fits its B (m x r).

    Raises:
        AdapterError: one does not.
    """
    for name in (name for name in found if name.endswith(_SIDES[0])):
        stored = name.removesuffix(_SIDES[0])
        a, b = found[name].shape, found[f"{stored}{_SIDES[1]}"].shape
        if not (len(a) == len(b) == 2 and a[0] == b[1] > 0):
            raise AdapterError(
                f"{file}: A of {stored} is {tuple(a)} and B is {tuple(b)}; export it again."
            )


def _opened(file: Path, architecture: str) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of a GGUF file, and its alpha.

    Raises:
        AdapterError: the file is damaged, or not an adapter for this architecture.
    """
    import gguf

    try:
        opened = gguf.GGUFReader(file)
        found = {each.name: _tensor(each, gguf) for each in opened.tensors}
        kind, own = (_value(opened, f"general.{name}") for name in ("type", "architecture"))
        alpha = float(_value(opened, "adapter.lora.alpha") or 0.0)
    except Exception as error:  # a damaged file can raise anything
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise AdapterError(f"{file}: truncated or damaged ({cause}); export it again.") from error
    if kind != "adapter" or own != architecture:
        raise AdapterError(
            f"{file} is a {kind or 'file'} for {own}, not an adapter for {architecture}; export the"
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
    """Convert a tensor to torch; llama.cpp lists sizes innermost first."""
    shape = [int(size) for size in reversed(entry.shape)]
    raw = torch.from_numpy(entry.data.copy())
    if entry.tensor_type == gguf.GGMLQuantizationType.BF16:
        return raw.view(torch.uint8).flatten().view(torch.bfloat16).view(shape)
    if not raw.is_floating_point():
        raise ValueError(f"{entry.name} is of type {entry.tensor_type.name}")
    return raw.view(shape)
