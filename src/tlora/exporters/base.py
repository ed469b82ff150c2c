"""The exporter interface, and functions that several exporters share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from tlora.adapter.saved import SavedLora
from tlora.adapter.savedconfig import CONFIG, WEIGHTS
from tlora.errors import AdapterError
from tlora.exporters.exportconfig import ExportConfig
from tlora.files import seal_tensors
from tlora.sealed import BESIDE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Source:
    """The adapter to export."""

    lora: SavedLora
    base: str
    """Folder or Hub name of the base model; "" if unknown."""
    sizes: dict[str, tuple[int, int]] | None
    """d_out and d_in of the base's linear layers by name; None if its configuration is
    unavailable."""
    config: ExportConfig


@dataclass
class Export:
    """Result of an exporter."""

    notes: list[str] = field(default_factory=list)
    """Notes on padding, truncation, zero filling and rounding, one sentence each."""
    largest_rank: int | None = None
    """Ranks of the written matrices; None if there are none."""
    todo: str = ""
    """What the serving command still needs; `{folder}` stands for the folder."""


class Exporter(Protocol):
    """An export format, created without arguments; third parties register one by an entry point."""

    needs: str | None
    """The package extra that it needs."""

    def write(self, source: Source, folder: Path) -> Export:
        """Write the format's files into a folder, which is renamed once complete.

        Raises:
            TLoraError: the format cannot hold this LoRA, or its files cannot be read.
        """


def counted(things: Sized, noun: str) -> str:
    """Return "1 module", or "2 modules"."""
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"


def refuse(lora: SavedLora, form: str, lacking: list[str], way_out: str) -> None:
    """Raise if ``lacking`` is not empty: parts that a format cannot represent.

    Raises:
        AdapterError: it is not.
    """
    if lacking:
        raise AdapterError(
            f"{lora.path} has {'; '.join(lacking)}, which {form} cannot represent; {way_out}."
        )


def copy_beside(source: Path, folder: Path, left: Collection[str]) -> None:
    """Copy missing files that belong to the weights, except those in ``left``.

    Raises:
        AdapterError: a file is a link out of the folder, which might lead anywhere.
    """
    # The Hub's cache stores the files of a folder two levels up.
    homes = (source.resolve(), source.resolve().parent.parent / "blobs")
    for file in sorted(source.iterdir()):
        wanted = file.is_file() and file.suffix in BESIDE and file.name not in left
        if wanted and not (folder / file.name).exists():
            if file.resolve().parent not in homes:
                raise AdapterError(f"{file} is a link out of its folder; remove it, or copy it in.")
            shutil.copyfile(file, folder / file.name)


def in_dtype(tensor: Tensor, name: str) -> Tensor:
    """Convert a tensor to a dtype by name; "auto" keeps its own."""
    return tensor if name == "auto" else tensor.to(DTYPES[name])


def scaled(b: Tensor, scale: float, dtype: str) -> Tensor:
    """Return s B, rounded once to the named dtype, or to B's own."""
    return in_dtype((b.double() * scale).to(b.dtype if dtype == "auto" else torch.float64), dtype)


def refuse_infinite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all values are finite after rounding.

    Raises:
        AdapterError: a tensor does not fit the requested dtype.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        dtype = str(tensors[bad[0]].dtype).removeprefix("torch.")
        raise AdapterError(
            f"{bad[0]} has values beyond {dtype}; export with --dtype bfloat16 or float32."
        )


def write_lora(folder: Path, fields: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a folder that PEFT reads, with a digest in the header of the weights.

    Raises:
        AdapterError: a tensor does not fit the requested dtype.
    """
    refuse_infinite(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    seal_tensors(folder / WEIGHTS)
    text = json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
