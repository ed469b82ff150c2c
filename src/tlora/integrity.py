"""Digests that show whether a file is unchanged since it was written.

A safetensors file carries its digest in its header's metadata, which other readers ignore; a JSON
file carries it in a field.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

DIGEST_KEY = "tlora_digest"
"""The key of the digest in a safetensors file's metadata."""
METADATA = "__metadata__"
MISMATCH = "its content does not match its digest"

_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_BLOCK = 2**20


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(_canonical(json.loads(json.dumps(value)))).hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return _rest(file, hashlib.sha256())


def has_digest(path: str | Path) -> bool:
    """Return whether a safetensors file carries a digest, after checking the content against it.

    Raises:
        ValueError: the content does not match, or the header is damaged.
    """
    with Path(path).open("rb") as file:
        header = read_header(file)
        expected = header.get(METADATA, {}).get(DIGEST_KEY)
        if expected is not None and expected != tensors_digest(header, file):
            raise ValueError(MISMATCH)
    return expected is not None


def carries_digest(path: str | Path) -> bool:
    """Return whether a safetensors file carries a digest, or is too damaged to tell."""
    with Path(path).open("rb") as file:
        try:
            return DIGEST_KEY in read_header(file).get(METADATA, {})
        except ValueError:
            return True


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Read the header of an opened safetensors file, up to where the tensors begin.

    Raises:
        ValueError: it is damaged.
    """
    length = file.read(8)
    size = int.from_bytes(length, "little")
    text = file.read(size) if size <= _LONGEST_HEADER else b""
    if len(length) < 8 or len(text) < size:
        raise ValueError("its header is cut off")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get(METADATA, {}), dict):
        raise ValueError("its header does not list tensors")
    return header


def tensors_digest(header: dict[str, Any], file: BinaryIO) -> str:
    """Return the digest of a safetensors file, read to its end in small blocks.

    Args:
        header: the result of `read_header`; a digest in it does not count.
        file: the file, at the first tensor.
    """
    metadata = {key: text for key, text in header.get(METADATA, {}).items() if key != DIGEST_KEY}
    return _rest(file, hashlib.sha256(_canonical(header | {METADATA: metadata})))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _rest(file: BinaryIO, digest: hashlib._Hash) -> str:
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
