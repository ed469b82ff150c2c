"""Digests of files and model folders, which detect changed rows and weights."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tlora.errors import DataError
from tlora.evaluations.names import check_files
from tlora.integrity import file_digest
from tlora.tasks.mixture import parts
from tlora.training.runconfig import RunConfig

_EDGE_BYTES = 2**20
FILE_FIELDS = (
    *("train_file", "eval_file", "data.chat_template"),
    *("trainer.deepspeed", "trainer.fsdp_config", "trainer.accelerator_config"),
)
"""Fields of a run that may name files whose content affects the weights."""
_FIELDS = (*FILE_FIELDS, "model", "continue_from")
_SETUP = ("*.json", "*.jinja", "*.model", "*.txt")


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Return the digests of a run's local inputs, by the dotted name of the field.

    Values that are not a local file or folder (a name on the Hub, a deleted file) are skipped.
    """
    values = config.to_dict()
    found = {name: input_digest(field_at(values, name)) for name in _FIELDS}
    if config.data.guard and config.data.guard_dir:
        with contextlib.suppress(DataError):
            found["data.guard_dir"] = _digest_of(
                check_files(config.data.guard, config.data.guard_dir)
            )
    return {name: digest for name, digest in found.items() if digest}


def field_at(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted field in a configuration's values; None if it is missing."""
    section, _, field = name.rpartition(".")
    return (values[section] if section else values).get(field)


def _digest_of(files: Iterable[Path]) -> str:
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()


def input_digest(path: Any) -> str | None:
    """Return the digest of a model's folder, or of rows: one file, or several read as one.

    None if a file is missing, or no path is given.
    """
    if not isinstance(path, str):
        return None
    if not path or Path(path).is_dir():
        return model_identity(path) if path else None
    named = parts(path)
    if not all(Path(part.path).is_file() for part in named):
        return None
    digests = [file_digest(part.path) for part in named]
    if len(named) == 1 and named[0].weight == 1:
        return digests[0]
    weighed = [f"{digest} {part.weight};" for digest, part in zip(digests, named, strict=True)]
    return hashlib.sha256("".join(weighed).encode()).hexdigest()


def model_identity(model: str | None) -> str:
    """Return the name of a model on the Hub, or a digest of the folder that holds one.

    Files that configure the model, tokenizer and chat template are read whole; of weight files,
    which may be huge, only the size and both ends; of an adapter everything.
    """
    folder = Path(str(model))
    if not folder.is_dir():
        return str(model)
    found = hashlib.sha256()
    for file in sorted(file for kind in _SETUP for file in folder.glob(kind)):
        found.update(f"{file.name} ".encode() + file.read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        edge = size if file.name.startswith("adapter_") else _EDGE_BYTES
        with file.open("rb") as weights:
            start = weights.read(edge)
            weights.seek(max(0, size - edge))
            found.update(f"{file.name} {size}".encode() + start + weights.read())
    return found.hexdigest()
