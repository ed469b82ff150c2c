"""Verdicts on an adapter folder, or an export of it, for each reader of adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tlora.adapter.saved import VARIANTS, SavedLora
from tlora.errors import AdapterError, listed
from tlora.exporters.readers import READERS, Reader, reading
from tlora.exporters.updates import Pairs
from tlora.verify.verdicts import Verdict


def by_every_reader(lora: SavedLora, meant: SavedLora | None = None) -> list[Verdict]:
    """Return a verdict for each reader of folders, PEFT first.

    Args:
        lora: the LoRA that they read.
        meant: the reference, as PEFT reads it; None: the LoRA itself.

    Raises:
        AdapterError: a module's size differs between the two.
    """
    if meant is None:
        return [Verdict.of(reading(reader, lora)) for reader in READERS]
    pairs, faults = paired(lora, meant), [*_faults(lora, meant)]
    return [Verdict.of(reading(reader, lora, pairs), faults) for reader in READERS]


def by_llama_cpp(lora: SavedLora, meant: SavedLora) -> list[Verdict]:
    """Return the verdict on a GGUF file, which llama.cpp alone reads.

    Args:
        lora: the file's LoRA, with llama.cpp's scales.
        meant: the adapter.

    Raises:
        AdapterError: a module's size differs between the two.
    """
    own = READERS[0]
    llama = Reader("llama.cpp", "llama.cpp (GGUF)", own.scales, ("llama.cpp", "ollama"))
    pairs = paired(lora, meant)
    return [Verdict.of(reading(llama, lora, pairs), [*_faults(lora, meant)])]


def paired(lora: SavedLora, meant: SavedLora) -> Pairs:
    """Return the computed updates of both.

    Raises:
        AdapterError: a module's size differs between the two.
    """
    pairs = Pairs(lora, meant)
    for name in pairs:
        try:
            pairs[name]
        except ValueError as sizes:
            raise AdapterError(
                f"{lora.path} is not an export of {meant.path}: {name} is {sizes}; give two"
                " adapters of the same base model."
            ) from sizes
    return pairs


def _faults(lora: SavedLora, meant: SavedLora) -> Iterator[str]:
    """Yield differences besides the updates, one noun phrase each."""
    if missing := [name for name in meant.keys if name not in lora.keys]:
        yield f"{listed(missing)} missing"
    extra = [n for n in lora.keys if n not in meant.keys and lora.tensors[lora.keys[n][1]].any()]
    if extra:
        yield f"{listed(extra)} not in the adapter"
    ours, theirs = _beside(lora), _beside(meant)
    if lost := [key for key in theirs if key not in ours]:
        yield f"{listed(lost)} missing"
    if more := [key for key in ours if key not in theirs]:
        yield f"{listed(more)} not in the adapter"
    fields = (*VARIANTS, "target_parameters", "trainable_token_indices")
    if other := [f for f in fields if (lora.fields.get(f) or 0) != (meant.fields.get(f) or 0)]:
        yield f"{listed(other)} of the configuration changed"
    shared = [key for key in theirs if key in ours]
    if off := [k for k in shared if not _alike(lora, k, ours[k], meant.tensors[k], theirs[k])]:
        yield f"{listed(off)} changed"


def _beside(lora: SavedLora) -> dict[str, float]:
    """Return the tensors besides A and B with their factors: s for a bias of B, else 1."""
    biases = lora.biases
    return {key: lora.scale(biases[key]) if key in biases else 1.0 for key in lora.others}


def _alike(lora: SavedLora, key: str, scale: float, meant: Tensor, other: float) -> bool:
    """Return whether a tensor equals the reference, up to rounding."""
    found = lora.tensors[key]
    if found.shape != meant.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, meant)
    limits = torch.finfo(found.dtype)
    right = meant.double() * other
    return torch.allclose(found.double() * scale, right, rtol=limits.eps, atol=limits.tiny)
