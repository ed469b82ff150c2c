"""What tells whether rows and weights are still the same: digests of files and of model folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tlora.integrity import file_digest
from tlora.tasks.mixture import parts
from tlora.training.runconfig import RunConfig

_EDGE_BYTES = 2**20
_SETUP = ("*.json", "*.jinja", "*.model", "*.txt")


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Return the digests of what a run reads from this machine, by field: rows and base model.

    What is not a local file or folder (a name on the Hub, a file that is gone) is left out.
    """
    names = ("train_file", "eval_file", "model", "continue_from")
    found = {name: input_digest(getattr(config, name)) for name in names}
    return {name: digest for name, digest in found.items() if digest}


def input_digest(path: str | None) -> str | None:
    """Return the digest of a model's folder, or of rows: one file, or several read as one.

    None where one of them is not there.
    """
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

    What sets model, tokenizer and chat template up is read whole; of weight files, which may be
    huge, the size and the two ends are; of an adapter all.
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
