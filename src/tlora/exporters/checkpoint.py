"""Find, check and rewrite the safetensors files of a base model, tensor by tensor."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlora.errors import ArtifactError, ConfigError, DiskFullError, listed
from tlora.files import read_json, seal_tensors, write_json
from tlora.integrity import DIGEST_KEY, METADATA, read_header
from tlora.models.pretrained import check_weights, readable
from tlora.sealed import BESIDE

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""safetensors' names of the dtypes that support merging."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the file.
        key: its name in the file.
        code: safetensors' name of its dtype.
        shape: its shape.
        bytes: its size in bytes.
    """

    file: Path
    key: str
    code: str
    shape: tuple[int, ...]
    bytes: int

    def read(self) -> Tensor:
        """Read the tensor."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.key)
            return tensor


@dataclass(frozen=True)
class Piece:
    """A tensor to write.

    Attributes:
        code: safetensors' name of its dtype.
        shape: its shape.
        bytes: its size in bytes.
        make: returns the tensor; called just before it is written.
    """

    code: str
    shape: tuple[int, ...]
    bytes: int
    make: Callable[[], Tensor]


def base_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a base model, downloading it from the Hub if needed.

    Raises:
        ConfigError: there is no such model, or the Hub cannot be reached.
    """
    with readable(name, "model"):
        if Path(name).is_dir():
            return Path(name)
        import huggingface_hub as hub

        fetch = functools.partial(
            hub.snapshot_download, name, revision=revision, ignore_patterns=["*/*"]
        )
        folder = Path(fetch(allow_patterns=[f"*{suffix}" for suffix in BESIDE]))
        fetch(allow_patterns=_shards(folder) or [SINGLE])
        return folder


def stored_tensors(folder: Path) -> dict[str, dict[str, Stored]]:
    """Return the tensors of a model by file and name, in file order; {} without safetensors.

    Raises:
        ConfigError: the index points outside the folder, or a file is missing, truncated, damaged
            or lacks a tensor listed in the index.
    """
    names = _shards(folder)
    if names is None and (folder / SINGLE).is_file():
        names = [SINGLE]
    if names is None:
        return {}
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise _broken(folder, f"{listed(missing)} is missing")
    check_weights(str(folder))
    found = {name: _stored(folder / name) for name in names}
    promised = [] if names == [SINGLE] else [*_weight_map(folder).items()]
    lost = [key for key, name in promised if key not in found[name]]
    if lost:
        raise _broken(folder, f"{listed(lost)} is not in the file listed in {INDEX}")
    return found


def _shards(folder: Path) -> list[str] | None:
    """Return the names of the weight files in the index; None without an index."""
    if (folder / SINGLE).exists() or not (folder / INDEX).is_file():
        return None
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Path) -> dict[str, str]:
    fields = read_json(folder / INDEX)
    found = fields.get("weight_map") if isinstance(fields, dict) else None
    if not found or not isinstance(found, dict):
        raise _broken(folder, f"{INDEX} maps no tensors to files")
    for name in found.values():
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise _broken(
                folder, f"{INDEX} lists {name!r}, which is not a safetensors file in the folder"
            )
    return found


def _stored(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt"), file.open("rb") as opened:
            header = read_header(opened)
    except (SafetensorError, ValueError) as error:
        raise _broken(file.parent, f"{file.name} is truncated or damaged ({error})") from error
    return {
        key: Stored(
            file,
            key,
            found["dtype"],
            tuple(found["shape"]),
            found["data_offsets"][1] - found["data_offsets"][0],
        )
        for key, found in header.items()
        if key != METADATA
    }


def _broken(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"{str(folder)!r}: {what}; download the base model again.", where="model")


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk has enough free space.

    Raises:
        DiskFullError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"the merged model needs {needed / 2**30:.1f} GiB, but {folder.parent} only has"
            f" {free / 2**30:.1f} GiB free; free some space, or use another --output_dir."
        )


def write_weights(
    folder: Path, files: Mapping[str, Mapping[str, Piece]], index: Path | None
) -> None:
    """Write weight files and their index, with one tensor in memory at a time.

    Args:
        folder: the target folder.
        files: the tensors by file and name.
        index: the base model's index, whose other fields are kept; None for a single file.

    Raises:
        ArtifactError: a tensor's shape differs from its declaration.
    """
    from tqdm.auto import tqdm

    count = sum(map(len, files.values()))
    with tqdm(total=count, desc="Merging", unit=" tensors", disable=None) as bar:
        for name, tensors in files.items():
            _write(folder / name, tensors, bar.update)
    if index is None:
        return
    places = {key: name for name, tensors in files.items() for key in tensors}
    about = read_json(index).get("metadata") or {}
    about |= {"total_size": sum(piece.bytes for each in files.values() for piece in each.values())}
    write_json(folder / INDEX, {"metadata": about, "weight_map": dict(sorted(places.items()))})


def _write(file: Path, pieces: Mapping[str, Piece], tell: Callable[[], Any]) -> None:
    """Write one safetensors file, with wide dtypes first so that all are aligned."""
    names = sorted(pieces, key=lambda name: (-_width(pieces[name]), name))
    header: dict[str, Any] = {METADATA: {"format": "pt", DIGEST_KEY: "0" * 64}}
    end = 0
    for name in names:
        piece = pieces[name]
        offsets = [end, end := end + piece.bytes]
        header[name] = {"dtype": piece.code, "shape": piece.shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _append(opened, name, pieces[name])
            tell()
    seal_tensors(file)  # in place: the header has room for the digest


def _append(opened: BinaryIO, name: str, piece: Piece) -> None:
    tensor = piece.make()
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    if tuple(tensor.shape) != piece.shape or content.size != piece.bytes:
        raise ArtifactError(
            f"{name} has shape {tuple(tensor.shape)} instead of {piece.shape}; please report this"
            " bug."
        )
    opened.write(content.data)


def _width(piece: Piece) -> float:
    return piece.bytes / max(1, math.prod(piece.shape))
