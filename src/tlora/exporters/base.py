"""What an exporter is given and what it promises; what several of them share."""

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
    """What is exported."""

    lora: SavedLora
    base: str
    """Folder or Hub name of the base model; "" where nothing names it."""
    sizes: dict[str, tuple[int, int]] | None
    """d_out and d_in of the base's linear layers by name; None where its configuration is out of
    reach."""
    config: ExportConfig


@dataclass
class Export:
    """What an exporter wrote."""

    notes: list[str] = field(default_factory=list)
    """What was padded, cut, filled with zeros or rounded, a sentence each."""
    largest_rank: int | None = None
    """Of the written matrices; None where none are left."""


class Exporter(Protocol):
    """A format. It is made without arguments; a third party registers one by an entry point."""

    needs: str | None
    """The extra of this package that it needs."""

    def write(self, source: Source, folder: Path) -> Export:
        """Write the format's files into a folder, which is put in its place when all are there.

        Raises:
            TLoraError: the format cannot hold this LoRA, or its files cannot be read.
        """


def counted(things: Sized, noun: str) -> str:
    """Return "1 module", or "2 modules"."""
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"


def refuse(lora: SavedLora, form: str, lacking: list[str], way_out: str) -> None:
    """Raise if there is anything in ``lacking`` that a format cannot hold.

    Raises:
        AdapterError: there is.
    """
    if lacking:
        raise AdapterError(
            f"{lora.path} has {'; '.join(lacking)}; {form} cannot hold that: {way_out}."
        )


def copy_beside(source: Path, folder: Path, left: Collection[str]) -> None:
    """Copy what lies beside weights and is not there yet, but for the names that are left out.

    Raises:
        AdapterError: one is a link out of the folder, which might lead to anything.
    """
    # The Hub's cache keeps the files of a folder two levels up.
    homes = (source.resolve(), source.resolve().parent.parent / "blobs")
    for file in sorted(source.iterdir()):
        wanted = file.is_file() and file.suffix in BESIDE and file.name not in left
        if wanted and not (folder / file.name).exists():
            if file.resolve().parent not in homes:
                raise AdapterError(f"{file} is a link out of its folder; remove it, or copy it in.")
            shutil.copyfile(file, folder / file.name)


def in_dtype(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor in a dtype by name; "auto" leaves its own."""
    return tensor if name == "auto" else tensor.to(DTYPES[name])


def scaled(b: Tensor, scale: float, dtype: str) -> Tensor:
    """Return s B, rounded once: to the dtype by name, or back to B's own."""
    return in_dtype((b.double() * scale).to(b.dtype if dtype == "auto" else torch.float64), dtype)


def refuse_infinite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all values are finite in the dtype that they were rounded to.

    Raises:
        AdapterError: a tensor does not fit the dtype that was asked for.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        dtype = str(tensors[bad[0]].dtype).removeprefix("torch.")
        raise AdapterError(
            f"{bad[0]} has values beyond {dtype}; export with --dtype bfloat16 or float32."
        )


def write_lora(folder: Path, fields: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a folder that PEFT reads, with a digest in the header of its weights.

    Raises:
        AdapterError: a tensor does not fit the dtype that was asked for.
    """
    refuse_infinite(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    seal_tensors(folder / WEIGHTS)
    text = json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
