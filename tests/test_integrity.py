"""A changed bit of what was written is found, wherever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlora import integrity
from tlora.errors import ArtifactError
from tlora.files import read_state, read_tensors, seal_tensors, write_state, write_tensors

TENSORS = {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)}
STATE = {"kind": "run", "config": {"seed": 3, "name": "größe"}, "rates": [0.1, 1e-7, None], "n": {}}


def flipped(file: Path, byte: int, bit: int) -> bytes:
    """Flip one bit of a file; return what it was before."""
    content = file.read_bytes()
    changed = bytearray(content)
    changed[byte] ^= 1 << bit
    file.write_bytes(changed)
    return content


def test_every_flipped_bit_of_a_tensor_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors(file, TENSORS, {"kind": "plan", "name": "größe"})
    read_tensors(file, "plan")
    for byte in range(file.stat().st_size):
        content = flipped(file, byte, byte % 8)
        with pytest.raises(ArtifactError, match=r"a\.safetensors: .*make it again\.$"):
            read_tensors(file, "plan")
        file.write_bytes(content)


def test_our_kinds_are_refused_without_a_digest(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file, metadata={"tlora": json.dumps({"kind": "plan"})})
    with pytest.raises(ArtifactError, match=r"it has no digest, .*; make it again"):
        read_tensors(file, "plan")
    seal_tensors(file)
    assert read_tensors(file, "plan")[1] == {"kind": "plan"}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "note": "größe 大"}])
def test_sealing_changes_the_header_alone(tmp_path: Path, metadata: dict | None) -> None:
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file, metadata=metadata)
    before = file.read_bytes()
    assert not integrity.has_digest(file)
    for _ in range(2):  # a second time changes nothing
        seal_tensors(file)
        assert integrity.has_digest(file)
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata()
        assert len(found.pop(integrity.DIGEST_KEY)) == 64
        assert found == (metadata or {})
        loaded = load_file(file)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    start = int.from_bytes(before[:8], "little") + 8
    assert file.read_bytes().endswith(before[start:])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_every_flipped_bit_of_a_state_is_found_or_changes_no_value(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_state(file, STATE)
    assert read_state(file) == STATE
    refused = 0
    for byte in range(file.stat().st_size):
        content = flipped(file, byte, byte % 8)
        try:
            assert read_state(file, "start again") == STATE
        except ArtifactError as fault:
            refused += 1
            assert str(fault).startswith(f"{file}: ")
            assert str(fault).endswith("; start again.")
        file.write_bytes(content)
    assert refused > 0.9 * file.stat().st_size


@pytest.mark.parametrize("text", ['{"kind": "run"}', "[1]", "3", '{"digest": null}'])
def test_a_state_without_its_digest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"run\.json: (not written by|its content)"):
        read_state(tmp_path / "run.json")


def test_the_digest_is_of_the_values_not_of_the_text(tmp_path: Path) -> None:
    write_state(tmp_path / "a.json", {"b": (1, 2), "a": {1: 0.5}})
    found = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(dict(reversed(found.items()))))
    assert read_state(tmp_path / "a.json") == {"b": [1, 2], "a": {"1": 0.5}}


def test_the_same_tensors_and_header_give_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(8)]
    for file in files:
        write_tensors(file, TENSORS, {"kind": "plan"})
    assert len({file.read_bytes() for file in files}) == 1
