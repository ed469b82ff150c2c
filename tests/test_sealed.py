"""A changed file beside weights is named, unless the weights were written anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tlora import sealed
from tlora.errors import ArtifactError
from tlora.files import seal_tensors
from tlora.sealed import DIGESTS, adapter_fields, check_beside, seal_beside

FIELDS = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "/here/base"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    seal_tensors(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(FIELDS))
    (tmp_path / "tokenizer.json").write_text('{"model": "BPE"}')
    (tmp_path / "README.md").write_text("a card")
    seal_beside(tmp_path)
    return tmp_path


def test_every_flipped_bit_of_a_tokenizer_is_named(adapter: Path) -> None:
    file = adapter / "tokenizer.json"
    content = file.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(ArtifactError, match=rf"tokenizer\.json: its .* or remove .*{DIGESTS}"):
            adapter_fields(adapter / "adapter_config.json")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing; put it back"):
        check_beside(adapter)
    (adapter / DIGESTS).unlink()  # as the sentence says
    assert adapter_fields(adapter / "adapter_config.json") == FIELDS


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = sealed.file_digest
    monkeypatch.setattr(
        sealed, "file_digest", lambda file: (read.append(file.name), digest(file))[1]
    )
    for _ in range(2):
        check_beside(adapter)  # written just now
    assert read == ["tokenizer.json"] * 2
    monkeypatch.setattr(sealed, "_SETTLED", -(10**12))
    for _ in range(3):
        check_beside(adapter)
    assert read == ["tokenizer.json"] * 3
    (adapter / "tokenizer.json").write_text('{"model": "WordPiece"}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: its content does not match"):
        check_beside(adapter)


def test_the_card_and_the_path_of_the_base_may_be_edited(adapter: Path) -> None:
    (adapter / "README.md").write_text("another card")
    moved = FIELDS | {"base_model_name_or_path": "owner/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(moved, indent=2))
    assert adapter_fields(adapter / "adapter_config.json") == moved
    (adapter / "adapter_config.json").write_text(json.dumps(moved | {"r": 5}))
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: its content does not match"):
        adapter_fields(adapter / "adapter_config.json")


def test_an_adapter_that_another_program_saved_over_ours_is_its_own(adapter: Path) -> None:
    save_file({"a": torch.ones(2)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(FIELDS | {"r": 5}))
    assert adapter_fields(adapter / "adapter_config.json")["r"] == 5


def test_damaged_digests_are_named(adapter: Path) -> None:
    (adapter / DIGESTS).write_text((adapter / DIGESTS).read_text()[:-9])
    with pytest.raises(ArtifactError, match=rf"{DIGESTS}: not JSON .* or remove "):
        check_beside(adapter)
