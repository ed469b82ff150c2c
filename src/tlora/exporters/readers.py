"""Compute how each program that reads LoRA folders would interpret one.

A reader multiplies B A of a module by a scale according to its own rule. Its error is the norm of
the difference to s B A, with PEFT's s, over the norm of s B A, both over all modules: 0 is exact, 1
is as wrong as dropping the adapter. The folder read may differ from the reference, for example an
export of it. The rules come from the readers' sources, in the versions listed in docs/serving.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tlora.adapter.saved import SavedLora, read_lora
from tlora.adapter.savedconfig import CONFIG
from tlora.errors import AdapterError, listed
from tlora.exporters.servers import SERVERS, stacked_rank
from tlora.exporters.uniform import gaps
from tlora.exporters.updates import Pairs
from tlora.integrations.vllm import VLLM_RANKS

_NOISE = 1e-12
"""Relative error of float64 itself."""
_MOST = 0.1
"""Largest acceptable rounding error, relative to a module's update."""
Scales = dict[str, float]


class RefusedError(Exception):
    """A reader rejects a folder; the message has the reason."""


@dataclass(frozen=True)
class Reader:
    """One reader, in versions with the same behavior."""

    name: str
    title: str
    scales: Callable[[SavedLora], Scales]
    """Returns the scale of B A for each module; raises RefusedError."""
    servers: tuple[str, ...] = ()
    """Its names in `--for`."""


@dataclass(frozen=True)
class Reading:
    """A reader's interpretation of a folder."""

    reader: Reader
    error: float | None
    """Relative error of the update; None if it rejects the folder."""
    refused: str | None = None
    rounding: float = 0.0
    """The error explained by the precision of the matrices."""
    modules: dict[str, float] = field(default_factory=dict)
    """Relative error of each inexact module; infinite if its update is zero."""

    @property
    def exact(self) -> bool:
        """Whether every module gets its own update, up to rounding of its matrices."""
        return self.error is not None and not self.modules and math.isfinite(self.error)


def reading(reader: Reader, lora: SavedLora, pairs: Pairs | None = None) -> Reading:
    """Return a reader's interpretation of a LoRA.

    Args:
        reader: the reader.
        lora: the LoRA that it reads.
        pairs: its updates paired with the reference; None if it is its own reference.
    """
    try:
        scales = reader.scales(lora)
    except RefusedError as refusal:
        return Reading(reader, None, str(refusal))
    if pairs is None and all(scales[name] == lora.scale(name) for name in lora.keys):
        return Reading(reader, 0.0)
    pairs = pairs or Pairs.of(lora)
    off = {name: pair.error(scales.get(name, 0.0)) for name, pair in pairs.items()}
    whole = math.hypot(*(pair.effect for pair in pairs.values()))
    error = math.hypot(*off.values())
    rounding = math.hypot(*(pair.rounding for pair in pairs.values()))
    modules = {
        name: off[name] / pair.effect if pair.effect else math.inf
        for name, pair in pairs.items()
        if not off[name] <= max(min(pair.rounding, _MOST * pair.effect), _NOISE * pair.effect)
    }
    if not whole:
        return Reading(reader, math.inf if error else 0.0, None, 0.0, modules)
    return Reading(reader, error / whole, None, rounding / whole, modules)


def exact(folder: Path, meant: SavedLora, form: str, server: str | None = None) -> list[str]:
    """Return the titles of the readers that read an export as PEFT reads the adapter.

    Args:
        folder: the exported folder.
        meant: the adapter.
        form: the format of the export.
        server: the target server.

    Raises:
        AdapterError: the server does not, or even PEFT does not because the precision of the
            folder lost an update.
    """
    if not (folder / CONFIG).is_file():
        own = ["transformers"] if form == "merged" else []
        return own + [info.title for info in SERVERS.values() if form in info.formats]
    lora = read_lora(folder)
    pairs = Pairs(lora, meant)
    readings = [reading(reader, lora, pairs) for reader in READERS]
    if not readings[0].exact:
        raise AdapterError(
            f"{meant.path}: rounding loses more than {_MOST:.0%} of the update of"
            f" {listed([*readings[0].modules])}; export with --dtype bfloat16 or float32."
        )
    for each in readings:
        if server in each.reader.servers and not each.exact:
            raise AdapterError(
                f"{each.reader.title} reads this adapter incorrectly"
                f" ({each.refused or f'its error is {each.error:.2g} of the update'}); merge it"
                " instead (tlora merge)."
            )
    return [each.reader.title for each in readings if each.exact]


def _peft(lora: SavedLora) -> Scales:
    return {name: lora.scale(name) for name in lora.keys}


def _hotswap(lora: SavedLora) -> Scales:
    """`hotswap_adapter` looks patterns up by tensor name; B comes last and decides."""
    scales = {}
    for name, (_, b) in lora.keys.items():
        key = re.sub(r"(\.weight)?$", r".default\1", b, count=1)
        rank, alpha = lora.pattern("rank_pattern", key, _r(lora)), _alpha(lora)
        scales[name] = lora.pattern("alpha_pattern", key, alpha) / _root(lora, rank)
    return scales


def _vllm_old(lora: SavedLora) -> Scales:
    _vllm(lora)
    return dict.fromkeys(lora.keys, _alpha(lora) / _root(lora, _r(lora)))


def _vllm(lora: SavedLora) -> Scales:
    _plain(lora, but=_HEADS)
    most = max(lora.rank(name) for name in lora.keys)
    if most > VLLM_RANKS[-1]:
        raise RefusedError(f"rank {most} is above its limit of {VLLM_RANKS[-1]}")
    return _peft(lora)


def _one_scale(lora: SavedLora) -> Scales:
    """SGLang: one buffer of rank r, and alpha / r for all modules."""
    _plain(lora)
    _equal_ranks(lora, "it asserts that they are equal")
    return dict.fromkeys(lora.keys, _alpha(lora) / _root(lora, _r(lora)))


def _stacked(lora: SavedLora) -> Scales:
    """TGI and LoRAX stack the layers of a projection, and drop it if one layer lacks it.

    They pad a rank to a size supported by their kernels, and then use the padded one as r: the
    first projection gets alpha / r, the others alpha / padded.
    """
    _plain(lora)
    _equal_ranks(lora, "it stacks the layers")
    first, padded = _kind(next(iter(lora.keys))), stacked_rank(_r(lora))
    scales = {
        name: _alpha(lora) / _root(lora, _r(lora) if _kind(name) == first else padded)
        for name in lora.keys
    }
    dropped = {_kind(name) for name in gaps(lora, None)}
    return {name: 0.0 if _kind(name) in dropped else scale for name, scale in scales.items()}


def _lmdeploy(lora: SavedLora) -> Scales:
    _plain(lora)
    _equal_ranks(lora, "it copies them into one buffer")
    if missing := [*gaps(lora, None)]:
        raise RefusedError(f"{listed(missing)} has no adapter, and it reads uninitialized memory")
    return dict.fromkeys(lora.keys, _alpha(lora) / _r(lora))


def _tensorrt(lora: SavedLora) -> Scales:
    """TensorRT-LLM: `lora_alpha` over the rank of each matrix, or its root."""
    _plain(lora)
    return {name: _alpha(lora) / _root(lora, lora.rank(name)) for name in lora.keys}


def _converted(lora: SavedLora) -> Scales:
    """llama.cpp's converter keeps one alpha; the runtime divides it by the rank of each matrix."""
    _plain(lora)
    return {name: _alpha(lora) / lora.rank(name) for name in lora.keys}


_HEADS = ("score", "classifier")
"""Classifier heads, which vLLM loads from an adapter."""


def _plain(lora: SavedLora, but: tuple[str, ...] = ()) -> None:
    saved = lora.fields.get("modules_to_save") or []
    lacking = [
        words
        for words in lora.lacks()
        if not (words.startswith("trained modules") and set(saved) <= set(but))
    ]
    if lacking:
        raise RefusedError(f"it does not support {'; '.join(lacking)}")


def _equal_ranks(lora: SavedLora, why: str) -> None:
    ranks = {lora.rank(name) for name in lora.keys}
    if ranks != {_r(lora)}:
        own = f"{min(ranks)} to {max(ranks)}, with r = {_r(lora)}"
        raise RefusedError(f"ranks differ ({own}), and {why}")


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _alpha(lora: SavedLora) -> float:
    return float(lora.fields.get("lora_alpha", 8))


def _r(lora: SavedLora) -> int:
    return int(lora.fields.get("r", 8))


def _root(lora: SavedLora, rank: int) -> float:
    return math.sqrt(rank) if lora.fields.get("use_rslora") else rank


READERS = (
    Reader("peft", "PEFT and transformers", _peft, ("peft",)),
    Reader("peft-hotswap", "PEFT's hotswap_adapter", _hotswap),
    Reader("vllm", "vLLM from 0.32", _vllm, ("vllm",)),
    Reader("vllm-0.31", "vLLM to 0.31", _vllm_old, ("vllm",)),
    Reader("sglang", "SGLang", _one_scale, ("sglang",)),
    Reader("tgi", "TGI and LoRAX", _stacked, ("tgi", "lorax")),
    Reader("lmdeploy", "LMDeploy", _lmdeploy, ("lmdeploy",)),
    Reader("tensorrt-llm", "TensorRT-LLM", _tensorrt, ("tensorrt-llm",)),
    Reader("llama.cpp", "llama.cpp's converter", _converted, ("llama.cpp", "ollama")),
)
"""All readers of LoRA folders, one line each in `verify`; PEFT comes first."""
