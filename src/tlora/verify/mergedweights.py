"""Compare a merged model with its base and adapter, tensor by tensor, from the files alone.

Compares W_merged - W with s B A for each module; all other tensors must equal the base's. Merging
in one step rounds each weight once, by at most u |w|, so differences up to u ||W|| are rounding.
"""

from __future__ import annotations

import dataclasses
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
    """Return the difference of a merged model to its base plus adapter.

    Args:
        folder: the folder of the merged model.
        base: the base.
        lora: the adapter.

    Raises:
        AdapterError: the adapter has parts not merged by adding s B A, or the base has no weight
            for a module.
        ConfigError: a model's files are damaged or missing.
    """
    _refuse_more_than_matrices(lora)
    model = skeleton(base, lora.fields.get("task_type"))
    before, after = (_tensors(model, place) for place in (base_folder(base.name), folder))
    updated = {f"{name}.weight": name for name in lora.keys}
    if unknown := [key for key in updated if key not in before]:
        raise AdapterError(
            f"the files of {base.name!r} have no {listed(unknown)}; give the adapter's own base"
            " with --model."
        )
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    faults = [*_elsewhere(before, after, updated, ties), *_settings(base, folder)]
    found: dict[str, tuple[float, ...]] = {}
    for key, name in updated.items():
        if key in after and after[key].shape == before[key].shape:
            turned = isinstance(model.get_submodule(name), Conv1D | nn.Embedding)
            found[name] = _off(before[key].read(), after[key].read(), lora.factors(name), turned)
    columns = [*zip(*found.values(), strict=True)] or [()] * 4
    error, effect, rounding, _ = (math.hypot(*each) for each in columns)
    wrong = {
        name: off / own if own else math.inf
        for name, (off, own, limit, beyond) in found.items()
        if not (off <= limit and beyond <= _SLACK * own)
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
            f"{lora.path} has {'; '.join(lacking)}, but only plain matrices can be compared with"
            " merged weights; compare replies with --prompts instead."
        )


def _tensors(model: Any, folder: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by their names in the model, without computed ones.

    Raises:
        ConfigError: there are no tensors.
    """
    files = stored_tensors(folder)
    found = {key: stored for tensors in files.values() for key, stored in tensors.items()}
    if not found:
        raise ConfigError(
            f"{str(folder)!r} has no safetensors files; give a folder with some.", "model"
        )
    names = names_in_model(model, found)
    return {name: found[key] for key, (name, is_computed) in names.items() if not is_computed}


_SLACK = 0.02
"""Tolerance beyond rounding for half-precision merges, relative to a module's update."""
_BLOCK = 4096
"""Rows of a weight per chunk."""


def _off(before: Tensor, after: Tensor, factors: Factors, transposed: bool) -> tuple[float, ...]:
    """Return ||W_merged - W - s B A||, ||s B A||, the rounding bound, and the norm beyond it.

    The last is the norm of each entry's excess over its own bound: if an update is smaller than the
    rounding of large weights, the small weights show whether it is present.
    """
    a, b = factors.a.double().flatten(1), factors.scale * factors.b.double().flatten(1)
    if transposed:
        a, b = b.T, a.T
    limits = torch.finfo(after.dtype)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(before), _BLOCK):
        rows = slice(start, start + _BLOCK)
        found, update = after[rows].double().flatten(1), b[rows] @ a
        off = found - before[rows].double().flatten(1) - update
        bound = (found.abs() * limits.eps / 2).clamp_min(limits.tiny * limits.eps)
        # The sum itself is computed in float32.
        bound += found.abs() * _FLOAT32
        beyond = (off.abs() - bound).clamp_min(0)
        sums += torch.stack([each.square().sum() for each in (off, update, bound, beyond)])
    return tuple(sums.sqrt().tolist())


_FLOAT32 = torch.finfo(torch.float32).eps


def _elsewhere(
    before: Mapping[str, Stored],
    after: Mapping[str, Stored],
    updated: Collection[str],
    ties: Mapping[str, str],
) -> Iterator[str]:
    """Yield differences outside the weights that the adapter updates, one noun phrase each."""
    # A tied head may be stored or omitted.
    lost = [k for k in before if k not in after and ties.get(k) not in after]
    if lost:
        yield f"{listed(lost)} missing"
    shared = before.keys() & after.keys()
    if other := sorted(key for key in shared if before[key].shape != after[key].shape):
        yield f"{listed(other)} of another size"
    alone = shared - set(other) - set(updated)
    if changed := sorted(key for key in alone if not _same(before[key].read(), after[key].read())):
        yield f"{listed(changed)} changed"


_FREE = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config"),
    *("tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Configuration fields that merging may change; `_elsewhere` checks the tie."""


def _settings(base: Pretrained, folder: Path) -> Iterator[str]:
    """Yield configuration fields that differ from the base's, as a noun phrase."""
    old, new = (
        _bound(dataclasses.replace(base, name=name).config().to_diff_dict())
        for name in (base.name, str(folder))
    )
    if changed := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        yield f"{listed(changed)} of config.json changed"


def _bound(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that must not change, including nested ones."""
    kept = {k: v for k, v in fields.items() if k not in _FREE and not k.startswith("_")}
    return {key: _bound(each) if isinstance(each, dict) else each for key, each in kept.items()}


def _same(old: Tensor, new: Tensor) -> bool:
    return torch.equal(old.to(new.dtype), new)
