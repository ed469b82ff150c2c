"""What a calibration is of: the model, the samples, and which statistics of which modules.

All three are cheap beside one forward pass, so every calibration carries them. They tell honest
mistakes apart (another checkpoint, another file of samples), not forgeries.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.offload import loaded_by
from tlora.calibration.sharding import is_zero3
from tlora.config import TLoraConfig

# What a calibration may hold, by the property of `TLoraConfig` that asks for it.
_KINDS = {
    "sensitivity": "needs_sensitivity",
    "moments": "needs_moments",
    "fisher": "needs_fisher",
    "gradient": "needs_gradient",
    "gradient_moment": "needs_gradient_moment",
}

_SAMPLED = 512  # entries looked at of a parameter
_PRIME = 2**255 - 19
_BASE = int.from_bytes(hashlib.sha256(b"tlora calibration batches").digest(), "big") % _PRIME


@dataclass(frozen=True)
class DataKey:
    """Identifies a sequence of batches: their tensors, their order and how they are batched.

    h = sum_k d_k b^(n - k) mod p, with d_k a digest of batch k of n: a polynomial in a fixed b, so
    that the key of two sequences, one after the other, is known from the keys of the two.

    Attributes:
        value: h.
        batches: n.
    """

    value: int = 0
    batches: int = 0

    def __add__(self, other: DataKey) -> DataKey:
        """Return the key of these batches followed by the other ones."""
        shifted = self.value * pow(_BASE, other.batches, _PRIME)
        return DataKey((shifted + other.value) % _PRIME, self.batches + other.batches)

    def then(self, batch: Mapping[str, Any]) -> DataKey:
        """Return the key of these batches followed by one more."""
        return self + DataKey(_digest_of(batch) % _PRIME, 1)

    def __str__(self) -> str:
        return f"{self.value:064x}-{self.batches}"

    @classmethod
    def parse(cls, text: str) -> DataKey:
        """Return the key that ``str`` wrote."""
        value, _, batches = text.partition("-")
        return cls(int(value, 16), int(batches))


@dataclass(frozen=True)
class Key:
    """What a calibration is of; two equal keys mean equal statistics, up to rounding.

    Attributes:
        model: of `model_key`.
        data: of a `DataKey`, as text.
        config: of `config_key`.
    """

    model: str
    data: str
    config: str

    def to_dict(self) -> dict[str, str]:
        """Return the key as plain JSON values."""
        return asdict(self)


def model_key(model: nn.Module) -> str:
    """Return a hash of the name, shape and dtype of every parameter, and of some of its bits.

    Up to 512 evenly spaced entries of each parameter are read, of quantised ones as they are
    stored. Not seen: a change that misses all of these entries, buffers and what a quantising
    library keeps outside the parameters, and the model's code and settings. Of weights that are
    sharded over processes, or offloaded, only name, shape and dtype are seen.
    """
    described = []
    samples: dict[torch.device, list[Tensor]] = {}
    offloaded = loaded_by(model)
    # Under each of its names, because an offloaded model unties its weights as it runs.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # DeepSpeed keeps the whole shape beside an emptied parameter.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        described.append(f"{name} {shape} {parameter.dtype}")
        # What DeepSpeed shards is whole at times.
        unseen = name in offloaded or is_zero3(parameter)
        for stored in [] if unseen else _stored(parameter.detach()):
            samples.setdefault(stored.device, []).append(_some_bytes(stored))
    digest = hashlib.sha256("\n".join(described).encode())
    for parts in samples.values():
        # One transfer a device, not one a parameter.
        digest.update(_bytes(torch.cat(parts)))
    return digest.hexdigest()


def statistics_kept(config: TLoraConfig) -> frozenset[str]:
    """Return which statistics a configuration calls for."""
    return frozenset(kind for kind, asks in _KINDS.items() if getattr(config, asks))


def config_key(names: Iterable[str], kept: Iterable[str]) -> str:
    """Return a hash of what a configuration makes of a calibration.

    The rest of it (rank, budget, scales, which basis, seed) concerns planning alone.

    Args:
        names: of the targeted modules, in model order.
        kept: which statistics, see `statistics_kept`.
    """
    return hashlib.sha256(json.dumps([list(names), sorted(kept)]).encode()).hexdigest()


def config_keys_that_do(names: Sequence[str], config: TLoraConfig) -> list[str]:
    """Return the keys of calibrations that hold what ``config`` needs: its own first, then more."""
    needed = statistics_kept(config)
    spare = sorted(set(_KINDS) - needed)
    return [
        config_key(names, needed | set(more))
        for count in range(len(spare) + 1)
        for more in itertools.combinations(spare, count)
    ]


def _stored(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a parameter is stored in."""
    # A process sees its own shard alone, and all have to come to the same key.
    if tensor.is_meta or hasattr(tensor, "placements"):
        return []
    # A subclass that stores something else than it says to be names its parts.
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (Tensor, nn.Parameter):
        return [tensor] if tensor.numel() else []
    return [part for name in flatten()[0] for part in _stored(getattr(tensor, name))]


def _some_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, -(-len(flat) // _SAMPLED))].contiguous().view(torch.uint8)


def _bytes(tensor: Tensor) -> Any:
    """Return a CPU view of the bytes of a tensor, for a hash to read."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest_of(batch: Mapping[str, Any]) -> int:
    digest = hashlib.sha256()
    for name in sorted(batch, key=str):
        digest.update(f"{name} ".encode())
        _feed(digest, batch[name])
    return int.from_bytes(digest.digest(), "big")


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest: tensors, arrays and images by content, also inside lists and dicts.

    Of other objects the type alone: their repr may hold where they lie in memory.
    """
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(_bytes(value.detach()))
    elif isinstance(value, Mapping):
        digest.update(f"{len(value)} named\n".encode())
        for name in sorted(value, key=str):
            digest.update(f"{name} ".encode())
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} listed\n".encode())
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "tobytes"):
        shape = getattr(value, "shape", getattr(value, "size", None))
        digest.update(f"{type(value).__name__} {shape} {getattr(value, 'dtype', '')}\n".encode())
        digest.update(value.tobytes())
    else:
        text = json.dumps(value, default=lambda other: type(other).__name__)
        digest.update(f"{text}\n".encode())
