"""Reads a LoRA folder: A, B, rank and scale of each module, without a model.

PEFT's rules, from its source (0.21): a module's rank and alpha come from the first pattern with a
matching key, else from `r` and `lora_alpha`; the scale is alpha / rank, with `use_rslora` alpha /
sqrt(rank). Tensors are read on demand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from tlora.adapter import bottleneck, load
from tlora.adapter.load import FLOATS, sound_shapes, targeted_names
from tlora.adapter.peft_types import KNOWN
from tlora.adapter.savedconfig import CONFIG, WEIGHTS, check_fields
from tlora.errors import AdapterError, listed
from tlora.sealed import adapter_fields

PREFIX = load.PREFIX

_A = (".lora_A.weight", ".lora_embedding_A")
_B = (".lora_B.weight", ".lora_embedding_B")

_NUMBER = re.compile(r"\.\d+\.")
"""The layer number, which only the full name of a module contains."""
VARIANTS = {
    "layer_replication": "replicated layers (`layer_replication`)",
    "alora_invocation_tokens": "an activation by tokens (aLoRA)",
    "use_qalora": "pooled inputs (QALoRA)",
    "use_bdlora": "block-diagonal matrices (BD-LoRA)",
    "arrow_config": "a router of adapters (Arrow)",
    "kasa_config": "a truncated base (KaSA)",
    "monteclora_config": "random updates (MonteCLoRA)",
}
"""PEFT fields with which a layer does not compute W + s B A, and their names in messages."""
MAGNITUDE = ".lora_magnitude_vector"
BIAS = ".lora_B.bias"
NESTED = "nested_ranks"
"""Header key of weights whose first K ranks are an adapter too, for any K."""
LEAST = "nested_ranks_from"
"""Header key of the smallest K that was trained."""
ROWS = ".token_adapter.trainable_tokens_delta"
_BESIDE = {"use_dora": MAGNITUDE, "lora_bias": BIAS, "trainable_token_indices": ROWS}
"""PEFT fields that add tensors to an adapter's file, and the suffixes of these tensors."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations of PEFT that change the base weights of the adapter."""


@dataclass(frozen=True)
class Factors:
    """The update of one module, s B A.

    Attributes:
        a: r x d_in; for a convolution r x channels x kernel, for an embedding r x vocabulary.
        b: d_out x r; for a convolution d_out x r x 1 ...
        scale: s.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rows of A."""
        return self.a.shape[0]


class Tensors(Mapping[str, Tensor]):
    """The tensors of an adapter's file, all checked, each read on demand.

    Raises:
        AdapterError: as `sound_shapes`.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.shapes = file, sound_shapes(file)
        with safe_open(file, framework="pt") as opened:
            self.codes = {key: opened.get_slice(key).get_dtype() for key in self.shapes}
            header = opened.metadata() or {}
        least = header.get(LEAST, "")
        self.nested, self.least = NESTED in header, int(least) if least.isdecimal() else 1

    def __getitem__(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: there is no tensor of this name.
        """
        if key not in self.shapes:
            raise KeyError(key)
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.shapes)


def announced(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield a noun phrase for each part besides A, B and a scale that the fields announce.

    Args:
        fields: of adapter_config.json.
    """
    named = {
        "use_dora": "DoRA's magnitudes",
        "lora_bias": "biases of B (`lora_bias`)",
        "target_parameters": "adapters of fused parameters (`target_parameters`)",
        "trainable_token_indices": "trained rows of embeddings (`trainable_token_indices`)",
        "modules_to_save": f"trained modules ({listed(fields.get('modules_to_save') or [])})",
        **VARIANTS,
    }
    yield from (words for name, words in named.items() if fields.get(name))
    if fields.get("bias", "none") != "none":
        yield f"trained biases (`bias: {fields['bias']}`)"


@dataclass(frozen=True)
class SavedLora:
    """A LoRA that PEFT reads.

    Attributes:
        path: its folder.
        fields: of adapter_config.json.
        tensors: by their names in the file.
        keys: the tensor names of A and B, by the module's full name in the base model.
    """

    path: Path
    fields: dict[str, Any]
    tensors: Mapping[str, Tensor]
    keys: dict[str, tuple[str, str]]

    @property
    def base(self) -> str | None:
        """The base model that the adapter names."""
        return self.fields.get("base_model_name_or_path")

    @property
    def nested(self) -> bool:
        """Whether its leading ranks were trained to work alone, at lora_alpha / their number."""
        return getattr(self.tensors, "nested", False)

    @property
    def least(self) -> int:
        """The smallest number of leading ranks that was trained, if they are nested."""
        return getattr(self.tensors, "least", 1)

    @property
    def others(self) -> list[str]:
        """The tensors besides A and B: heads, biases, magnitudes, rows of tokens."""
        ours = {key for pair in self.keys.values() for key in pair}
        return [key for key in self.tensors if key not in ours]

    @property
    def biases(self) -> dict[str, str]:
        """The module by the name of its B's bias, if it has one: the bias is scaled like B."""
        return {b.removesuffix("weight") + "bias": name for name, (_, b) in self.keys.items()}

    def factors(self, module: str) -> Factors:
        """Read the update of a module."""
        a, b = self.keys[module]
        return Factors(self.tensors[a], self.tensors[b], self.scale(module))

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return int(self.pattern("rank_pattern", module, self.fields.get("r", 8)))

    def alpha(self, module: str) -> float:
        """Return the alpha that the configuration gives a module."""
        return float(self.pattern("alpha_pattern", module, self.fields.get("lora_alpha", 8)))

    def scale(self, module: str) -> float:
        """Return s of a module, as PEFT computes it."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def pattern(self, field: str, module: str, otherwise: Any) -> Any:
        """Return the value of `rank_pattern` or `alpha_pattern` for a name, by PEFT's matching."""
        pattern = self.fields.get(field) or {}
        return pattern.get(get_pattern_key(list(pattern), module), otherwise)

    def lacks(self) -> Iterator[str]:
        """Yield a noun phrase for each part besides A, B and a scale of linear layers."""
        yield from announced(self.fields)
        embeddings = [name for name, (a, _) in self.keys.items() if "lora_embedding_A" in a]
        if embeddings:
            yield f"adapters of embeddings ({listed(embeddings)})"
        if more := [name for name in self.others if not self._is_named(name)]:
            yield f"other tensors ({listed(more)})"
        deep = [n for n, (a, _) in self.keys.items() if n not in embeddings and self._dims(a) != 2]
        if deep:
            yield f"adapters of convolutions ({listed(deep)})"

    def in_full(self, key: str) -> bool:
        """Return whether a tensor belongs to a module that trained in full (`modules_to_save`)."""
        parts = key.removeprefix(PREFIX).split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(m.endswith(s) for m in modules for s in self.fields.get("modules_to_save") or [])

    def _is_named(self, key: str) -> bool:
        """Return whether a configuration field announces this tensor."""
        is_bias = key.endswith(".bias") and self.fields.get("bias", "none") != "none"
        return is_bias or key.endswith((*_BESIDE.values(),)) or self.in_full(key)

    def _dims(self, key: str) -> int:
        return len(shape_of(self.tensors, key))


def shape_of(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Return the shape of a tensor, without reading it from a file."""
    if isinstance(tensors, Tensors):
        return tensors.shapes[key]
    return tuple(tensors[key].shape)


def read_lora(path: str | Path) -> SavedLora:
    """Read the LoRA in a folder, ours or any other written by PEFT's `save_pretrained`.

    Args:
        path: the folder.

    Raises:
        AdapterError: it holds no LoRA, a file is truncated or damaged, a tensor is not finite or
            has no counterpart, or ranks contradict the configuration.
        ArtifactError: its adapter_config.json is missing or damaged.
    """
    path = Path(path)
    fields = adapter_fields(path / CONFIG)
    if fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type")
        raise AdapterError(f"{path} holds an adapter of type {kind}, not a LoRA; {_way_out(kind)}.")
    check_fields(path, fields)
    file = path / WEIGHTS
    if not file.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        why = (
            "its weights are in a pickle, adapter_model.bin" if pickled else "there are no weights"
        )
        raise AdapterError(
            f"{path} has no {WEIGHTS} ({why}); save the adapter by `model.save_pretrained`, which"
            " writes safetensors."
        )
    tensors = Tensors(file)
    _check_numbers(path, tensors)
    start = str(fields.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_THE_BASE):
        raise AdapterError(
            f"{path}: `init_lora_weights` is {start!r}, so it was trained on changed "
            "base weights; save it with `path_initial_model_for_weight_conversion`, "
            "which makes it a plain LoRA."
        )
    lora = SavedLora(path, fields, tensors, _paired(path, tensors.shapes))
    _check_ranks(lora)
    _check_complete(lora)
    return lora


def _way_out(kind: Any) -> str:
    """Return what can be done with an adapter of another type than LoRA."""
    if kind == bottleneck.PEFT_TYPE:
        return (
            "it is not linear, so it can be neither exported nor merged; `tlora chat` and"
            " `tlora eval` load it"
        )
    known = KNOWN.get(str(kind).lower())
    if known is None:
        return "give the folder of a LoRA adapter"
    if known.unmerged:
        return f"{known.unmerged}, so it cannot be merged; load it with PEFT"
    return "merge it with PEFT's `merge_and_unload()`"


def _check_numbers(path: Path, tensors: Tensors) -> None:
    """Check that matrices hold floating-point numbers of at least 16 bits.

    Raises:
        AdapterError: a matrix does not.
    """
    odd = {key: code for key, code in tensors.codes.items() if code not in FLOATS}
    odd = {key: code for key, code in odd.items() if key.endswith((*_A, *_B))}
    if odd:
        raise AdapterError(
            f"{path}: {listed([*odd])} is stored as {next(iter(odd.values()))}, not "
            "in floating point of at least 16 bits; save the adapter again."
        )


def _paired(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    foreign = [key for key in shapes if not key.startswith(PREFIX)]
    if foreign:
        raise AdapterError(
            f"{path}: {listed(foreign)} is not a name that PEFT writes ({PREFIX}...); save the"
            " adapter by `model.save_pretrained`."
        )
    sides: list[dict[str, str]] = [{}, {}]
    for key in shapes:
        for side, endings in zip(sides, (_A, _B), strict=True):
            for ending in endings:
                if key.endswith(ending):
                    side[key.removeprefix(PREFIX).removesuffix(ending)] = key
    lone = sorted(sides[0].keys() ^ sides[1].keys())
    if lone:
        raise AdapterError(
            f"{path}: {listed(lone)} has only one of A and B; the file is incomplete, save or copy"
            " the adapter again."
        )
    if not sides[0]:
        raise AdapterError(f"{path} holds no LoRA matrices; give the folder of an adapter.")
    return {name: (sides[0][name], sides[1][name]) for name in sorted(sides[0], key=_in_order)}


def _in_order(name: str) -> list[str | int]:
    """Return a key that sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _check_ranks(lora: SavedLora) -> None:
    if lora.fields.get("target_parameters"):
        return  # one A for all experts: its row count is not the rank
    for name, (a, b) in lora.keys.items():
        shapes = [shape_of(lora.tensors, key) for key in (a, b)]
        if any(len(shape) < 2 for shape in shapes):
            raise AdapterError(
                f"{lora.path}: A and B of {name} have shapes {shapes[0]} and {shapes[1]}, "
                "so they are not matrices; save or copy the adapter again."
            )
        rows, columns = shapes[0][0], shapes[1][1]
        if rows != columns or rows != lora.rank(name):
            raise AdapterError(
                f"{lora.path}: {name} has rank {lora.rank(name)} in {CONFIG}, and {rows} rows in A,"
                f" {columns} columns in B; the folder was edited or mixed, save the adapter again."
            )


def _check_complete(lora: SavedLora) -> None:
    """Refuse a folder whose weights contradict its configuration.

    Raises:
        AdapterError: a module named in full has no matrices, or a field has no tensors.
    """
    for field, ending in _BESIDE.items():
        said, there = lora.fields.get(field), [k for k in lora.others if k.endswith(ending)]
        with_it = {key.removeprefix(PREFIX).removesuffix(ending) for key in there}
        plain = [n for n, (a, _) in lora.keys.items() if a.endswith(_A[0])]
        without = [n for n in plain if n not in with_it and ending != ROWS]
        if bool(said) != bool(there) or (said and without):
            raise AdapterError(
                f"{lora.path}: {CONFIG} has `{field}: {said}`, and {len(there)} tensors of the"
                f" weights end in {ending}; the folder was edited or mixed, save the adapter again."
            )
    if lora.fields.get("modules_to_save") and not any(map(lora.in_full, lora.others)):
        raise AdapterError(
            f"{lora.path} has no weights of {listed(lora.fields['modules_to_save'])}, which"
            f" {CONFIG} names in `modules_to_save`; save the adapter again."
        )
    if lora.fields.get("target_parameters") or lora.fields.get("layer_replication"):
        return  # their names are not module names
    targets = lora.fields.get("target_modules") or []
    full = [] if isinstance(targets, str) else [each for each in targets if _NUMBER.search(each)]
    full = targeted_names(lora.fields, full)
    lacking = [each for each in full if not any(f".{n}".endswith(f".{each}") for n in lora.keys)]
    if lacking:
        raise AdapterError(
            f"{lora.path} has no matrices for {listed(sorted(lacking))}, which {CONFIG} names; the"
            " file is incomplete, save or copy the adapter again."
        )
