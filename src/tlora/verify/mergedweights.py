"""A merged model against its base and the adapter, tensor by tensor, from the files alone.

W_merged - W is compared with s B A of each module; all other tensors must be the base's. Merging in
one step rounds each weight once, by at most u |w|, so a difference up to u ||W|| is that of
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tlora.adapter.saved import Factors, SavedLora
from tlora.errors import AdapterError, ConfigError, listed
from tlora.exporters.checkpoint import Stored, base_folder, stored_tensors
from tlora.exporters.servers import SERVERS
from tlora.models.pretrained import Pretrained
from tlora.models.skeleton import names_in_model, skeleton
from tlora.verify.verdicts import Verdict


def check(folder: Path, base: Pretrained, lora: SavedLora) -> Verdict:
    """Return how far a merged model is from its base and the adapter.

    Args:
        folder: of the merged model.
        base: the base.
        lora: the adapter.

    Raises:
        AdapterError: the adapter holds what is not merged by adding s B A, or the base has no
            weight of a module.
        ConfigError: a model's files are damaged, or there are none.
    """
    _refuse_more_than_matrices(lora)
    model = skeleton(base, lora.fields.get("task_type"))
    before, after = (_tensors(model, place) for place in (base_folder(base.name), folder))
    updated = {f"{name}.weight": name for name in lora.keys}
    if unknown := [key for key in updated if key not in before]:
        raise AdapterError(
            f"the files of {base.name!r} have no {listed(unknown)}; give the adapter's own base by"
            " --model."
        )
    faults = [*_elsewhere(before, after, updated)]
    found: dict[str, tuple[float, float, float]] = {}
    for key, name in updated.items():
        if key in after and after[key].shape == before[key].shape:
            turned = isinstance(model.get_submodule(name), Conv1D | nn.Embedding)
            found[name] = _off(before[key].read(), after[key].read(), lora.factors(name), turned)
    error, effect, rounding = (math.hypot(*each) for each in zip(*found.values(), strict=True))
    wrong = {
        name: off / own if own else math.inf
        for name, (off, own, limit) in found.items()
        if off > limit
    }
    return Verdict(
        "merged",
        "every reader of merged models",
        ("peft", *(name for name, info in SERVERS.items() if "merged" in info.formats)),
        error / effect if effect else float(bool(wrong)),
        rounding=rounding / effect if effect else 0.0,
        exact=not wrong and not faults,
        modules=wrong,
        faults=faults,
    )


def _refuse_more_than_matrices(lora: SavedLora) -> None:
    lacking = [words for words in lora.lacks() if not words.startswith("adapters of embeddings")]
    if lacking:
        raise AdapterError(
            f"{lora.path} has {'; '.join(lacking)}; only plain matrices can be compared with merged"
            " weights from the files alone."
        )


def _tensors(model: Any, folder: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by their names in the model; computed ones are left out.

    Raises:
        ConfigError: there are none.
    """
    files = stored_tensors(folder)
    found = {key: stored for tensors in files.values() for key, stored in tensors.items()}
    if not found:
        raise ConfigError(f"{str(folder)!r} has no safetensors files.", "model")
    names = names_in_model(model, found)
    return {name: found[key] for key, (name, is_computed) in names.items() if not is_computed}


_BLOCK = 4096
"""Rows of a weight at a time."""


def _off(
    before: Tensor, after: Tensor, factors: Factors, transposed: bool
) -> tuple[float, float, float]:
    """Return ||W_merged - W - s B A||, ||s B A|| and the bound of rounding, in float64."""
    a, b = factors.a.double().flatten(1), factors.scale * factors.b.double().flatten(1)
    if transposed:
        a, b = b.T, a.T
    limits = torch.finfo(after.dtype)
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(before), _BLOCK):
        rows = slice(start, start + _BLOCK)
        found, update = after[rows].double().flatten(1), b[rows] @ a
        off = found - before[rows].double().flatten(1) - update
        bound = (found.abs() * limits.eps / 2).clamp_min(limits.tiny * limits.eps)
        # The sum itself is made in float32.
        bound += found.abs() * _FLOAT32
        sums += torch.stack([each.square().sum() for each in (off, update, bound)])
    error, effect, bound = sums.sqrt().tolist()
    return error, effect, bound


_FLOAT32 = torch.finfo(torch.float32).eps


def _elsewhere(
    before: Mapping[str, Stored], after: Mapping[str, Stored], updated: Collection[str]
) -> Iterator[str]:
    """Yield what differs outside of the weights that the adapter updates, a noun phrase each."""
    # A tied head may be written out, or left out.
    lost = [k for k in before if k not in after and not k.endswith("lm_head.weight")]
    if lost:
        yield f"{listed(lost)} missing"
    shared = before.keys() & after.keys()
    if other := sorted(key for key in shared if before[key].shape != after[key].shape):
        yield f"{listed(other)} of another size"
    alone = shared - set(other) - set(updated)
    if changed := sorted(key for key in alone if not _same(before[key].read(), after[key].read())):
        yield f"{listed(changed)} changed"


def _same(old: Tensor, new: Tensor) -> bool:
    return torch.equal(old.to(new.dtype), new)
