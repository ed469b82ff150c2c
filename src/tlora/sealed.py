"""The files beside weights (configuration, tokenizer, chat template), sealed by ``digests.json``.

Weights carry a digest of their own; a bit of another file can change every answer just as well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError
from tlora.files import read_json, read_state, write_state
from tlora.integrity import MISMATCH, carries_digest, file_digest, json_digest

DIGESTS = "digests.json"
BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
"""Endings of the files that lie beside weights and belong to them: tokenizer, template, code."""
_CONFIG = "adapter_config.json"
_SETTLED = 3 * 10**9
"""Nanoseconds; two changes further apart have different times on every file system."""
_known: dict[tuple[Any, ...], str] = {}
_MAY_CHANGE = ("base_model_name_or_path", "revision")
"""Fields of adapter_config.json that people edit, as the base lies elsewhere."""


def seal_beside(folder: Path) -> None:
    """Write the digests of the files beside safetensors, if there are any, as the last file."""
    if not any(folder.glob("*.safetensors")):
        return
    files = sorted(file for file in folder.iterdir() if file.suffix in BESIDE)
    digests = {file.name: _digest(file) for file in files if file.name != DIGESTS}
    write_state(folder / DIGESTS, {"files": digests})


def check_beside(folder: Path) -> None:
    """Check the files beside weights, where the weights are still those that tlora wrote.

    Raises:
        ArtifactError: one was edited, is damaged or is missing.
    """
    file = folder / DIGESTS
    if not file.is_file() or not all(map(carries_digest, folder.glob("*.safetensors"))):
        return
    advice = f"put it back as it was, or remove {file} to use the files as they are"
    for name, digest in read_state(file, advice)["files"].items():
        found = folder / name
        if not found.is_file():
            raise ArtifactError(f"{found} is missing; {advice}.")
        if _digest_once(found) != digest:
            raise ArtifactError(f"{found}: {MISMATCH}, so it was edited or is damaged; {advice}.")


def adapter_fields(path: str | Path) -> dict[str, Any]:
    """Return the fields of an adapter_config.json, which anyone may have written.

    Raises:
        ArtifactError: the file is missing, or not the configuration of an adapter; or a file
            beside it was edited or is damaged.
    """
    fields = read_json(path)
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type", ""), str):
        raise ArtifactError(f"{path}: not the configuration of an adapter of PEFT.")
    check_beside(Path(path).parent)
    return fields


def _digest_once(file: Path) -> str:
    """Return the digest of a file, which is not read again until its inode, size or times change.

    A file that changed just now is always read: the next change might get the same times.
    """
    state = file.stat()
    times = (state.st_mtime_ns, state.st_ctime_ns)
    key = (file.absolute(), state.st_ino, state.st_size, *times)
    if key in _known:
        return _known[key]
    settled = time.time_ns() - max(times) > _SETTLED
    digest = _digest(file)
    if settled:
        _known[key] = digest
    return digest


def _digest(file: Path) -> str:
    if file.name != _CONFIG:
        return file_digest(file)
    fields = read_json(file)
    kept = fields if isinstance(fields, dict) else {}
    return json_digest({name: kept[name] for name in kept if name not in _MAY_CHANGE})
