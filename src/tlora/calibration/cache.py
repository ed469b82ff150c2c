"""The file that keeps a calibration, and the key that says what a calibration is of.

A key is cheap beside one forward pass, so every calibration carries one. It tells honest mistakes
apart (another checkpoint, another file of samples), not forgeries.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.batches import as_batch
from tlora.calibration.placement import is_zero3, loaded_by
from tlora.errors import CalibrationError

Batch = Mapping[str, Any]

_SAMPLED = 512  # entries of a parameter that go into the key
_WAYS_OUT = "give another `cache`, or delete this file to calibrate again"


@dataclass(frozen=True)
class Key:
    """What a calibration is of.

    Attributes:
        model: of `model_key`.
        data: of `batch_digest`, one for each batch in order.
    """

    model: str
    data: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the key as plain JSON values."""
        return {"model": self.model, "data": list(self.data)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Key:
        """Return the key that `to_dict` wrote."""
        return cls(values["model"], tuple(values["data"]))


def refuse_another(path: Path, saved: Key | None, key: Key, missing: Sequence[str]) -> None:
    """Check that a cached calibration is the one that is asked for.

    Args:
        path: the file.
        saved: the key in it.
        key: what is asked for.
        missing: what the file lacks beside, in words.

    Raises:
        CalibrationError: it is another calibration; every difference is named.
    """
    if saved is None:
        raise CalibrationError(f"{path} does not say what it is of; {_WAYS_OUT}.")
    differing = []
    if saved.model != key.model:
        differing.append("model (other parameters)")
    if saved.data != key.data:
        differing.append("data (other samples, or in another order or other batches)")
    if missing:
        differing.append(f"config ({'; '.join(missing)})")
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        raise CalibrationError(
            f"{path} is another calibration: its {' and its '.join(differing)} {verb}; {_WAYS_OUT}."
        )


def refuse_skipped(path: Path, count: int) -> None:
    """Refuse a cached calibration that left ``count`` bad samples out.

    Raises:
        CalibrationError: the count is above 0.
    """
    if count:
        raise CalibrationError(
            f"{path} leaves out {count} bad samples; allow that by skip_bad_samples, or"
            f" {_WAYS_OUT}."
        )


def refuse_unwritable(folder: Path) -> None:
    """Make the folder of a cache before anything runs.

    Raises:
        CalibrationError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "it is not writable"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise CalibrationError(
            f"a calibration cannot be kept in {folder}: {reason}; give `cache` another folder."
        )


def model_key(model: nn.Module) -> str:
    """Return a hash of the name, shape and dtype of every parameter, and of some of its bits.

    Up to 512 evenly spaced entries of each parameter are read, of quantized ones as they are
    stored. Not seen: a change that misses all of these entries, buffers and what a quantizing
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


def digested(batches: Iterable[Batch], digests: list[str]) -> Iterator[Batch]:
    """Yield the batches, and append the digest of each to ``digests``."""
    for batch in batches:
        digests.append(batch_digest(as_batch(batch, torch.device("cpu"))))
        yield batch


def batch_digest(batch: Batch) -> str:
    """Return the SHA-256 of what a batch holds, whatever the order of its keys.

    Tensors, arrays and images count by content, also inside lists and dicts; of other objects the
    type alone, since their repr may hold where they lie in memory.
    """
    digest = hashlib.sha256()
    _feed(digest, batch)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
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
