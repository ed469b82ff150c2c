"""Files and folders appear whole or not at all, and damage is named."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tlora.errors import ArtifactError, ConfigError
from tlora.files import (
    clear_leftovers,
    locked,
    read_json,
    read_tensors,
    replacing_file,
    replacing_folder,
    write_json,
    write_tensors,
)


class StopHere(BaseException):
    """Like an interrupt: not an ``Exception``."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with replacing_file(path) as part:
            part.write_text(text)
            assert part.parent == path.parent
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("existed", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, existed: bool) -> None:
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")
    with pytest.raises(StopHere), replacing_file(path) as part:
        part.write_text("half")
        raise StopHere
    assert names(tmp_path) == (["a.txt"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_a_written_file_has_the_rights_of_an_ordinary_one(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with replacing_file(tmp_path / "a.txt") as part:
            part.write_text("x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    for name in ("first", "second"):
        with replacing_folder(path) as part:
            (part / name).write_text(name)
            assert not (path / name).exists()
        assert names(path) == [name]
    assert names(path.parent) == ["run"]


@pytest.mark.parametrize("existed", [True, False])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path, existed: bool) -> None:
    path = tmp_path / "run"
    if existed:
        path.mkdir()
        (path / "kept").write_text("old")
    with pytest.raises(StopHere), replacing_folder(path) as part:
        (part / "half").write_text("half")
        raise StopHere
    assert names(tmp_path) == (["run"] if existed else [])
    assert not existed or names(path) == ["kept"]
    assert not existed or (path / "kept").read_text() == "old"


@pytest.mark.parametrize("exists", [True, False])
def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "target").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "target")
    with replacing_folder(tmp_path / "run") as part:
        (part / "new").write_text("new")
    assert names(tmp_path) == ["run", "target"]
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "target") == ["new"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("mine")
    with pytest.raises(ArtifactError, match=r"run: this is a file"), replacing_folder(path):
        pass
    assert names(tmp_path) == ["run"]
    assert path.read_text() == "mine"


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"name": "größe 大", "ranks": [1, 2], "scale": 0.1, "none": None, "nested": {"a": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "größe 大" in text
    assert text.endswith("}\n")


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert read_json(path) == [1]
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b'["\\ud800"]'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.json: (not JSON|has half of a surrogate)"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [read_json, lambda path: read_tensors(path, "plan")])
def test_a_missing_file_is_named(tmp_path: Path, read: Callable) -> None:
    with pytest.raises(ArtifactError, match=r"absent: there is no such file"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool])
def test_tensors_and_header_come_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "whole": torch.arange(12).reshape(3, 4).to(dtype),
        "transposed": torch.arange(12).reshape(3, 4).to(dtype).T,
        "rows": torch.arange(12).reshape(3, 4).to(dtype)[1:],
        "empty": torch.zeros(0, 4, dtype=dtype),
    }
    header = {"kind": "plan", "name": "größe", "nested": {"r": [1, 2.5, None]}}
    write_tensors(tmp_path / "a.safetensors", tensors, header)
    found, found_header = read_tensors(tmp_path / "a.safetensors", "plan")
    assert found_header == header
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    assert names(tmp_path) == ["a.safetensors"]


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.ones(2)}, {"kind": "calibration"})
    with pytest.raises(ArtifactError, match=r"a: this is 'calibration', not 'plan'"):
        read_tensors(tmp_path / "a", "plan")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_tensor_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(100)}, {"kind": "plan"})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"a\.safetensors: not a readable safetensors file"):
        read_tensors(path, "plan")


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    refusal = ConfigError("taken", where="here")
    with locked(path, refusal):
        with pytest.raises(ConfigError, match="taken"), locked(path, refusal):
            pass
        path.unlink()  # as its holder may
    with locked(path, refusal):
        assert path.is_file()


def test_a_lock_file_that_was_removed_while_it_was_opened_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refusal = tmp_path / "new" / ".lock", ConfigError("taken", where="here")
    real, opened = os.open, []

    def slow(*arguments: object, **options: object) -> int:
        opened.append(real(*arguments, **options))
        if len(opened) == 1:
            path.unlink()
            path.parent.rmdir()
        return opened[-1]

    monkeypatch.setattr(os, "open", slow)
    with locked(path, refusal):
        assert len(opened) == 2
        assert os.path.samestat(os.fstat(opened[1]), path.stat())


def test_a_lock_file_has_the_rights_of_an_ordinary_file(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with locked(tmp_path / ".lock", ConfigError("taken", where="here")):
            assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o644
    finally:
        os.umask(old)


def killed(write: Callable) -> None:
    """Call ``write`` and leave what a kill leaves: no clean-up runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(StopHere):
            write()


def test_what_killed_processes_were_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    def half_file() -> None:
        with replacing_file(tmp_path / "run.json"):
            raise StopHere

    def half_folder() -> None:
        with replacing_folder(tmp_path / "adapter") as part:
            (part / "half").touch()
            raise StopHere

    mine = [".hidden", ".a.part", "b.12345678.part", ".other.json.abcdefgh.part"]
    for name in mine:
        (tmp_path / name).touch()
    killed(half_file)
    killed(half_folder)
    assert len(names(tmp_path)) == len(mine) + 3
    (tmp_path / ".adapter.lock").unlink()
    clear_leftovers(tmp_path, {"run.json", "adapter"})
    assert names(tmp_path) == sorted(mine)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted(mine[:-1])
    clear_leftovers(tmp_path / "absent")


@pytest.mark.parametrize("moves", [1, 2])
def test_a_folder_that_was_being_replaced_when_a_kill_came_is_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """The kill comes when the old one is set aside, or when the new one stands beside it."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").touch()
    real, done = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if len(done) == moves:
            raise StopHere
        done.append(target)
        return real(self, target)

    def write() -> None:
        with replacing_folder(path) as part:
            (part / "new").touch()
        raise StopHere

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        killed(write)
    assert path.exists() is (moves == 2)
    (tmp_path / ".adapter.lock").unlink()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["adapter"]
    assert names(path) == ["new"]


def test_who_writes_a_folder_removes_what_a_killed_process_left_of_it(tmp_path: Path) -> None:
    def half() -> None:
        with replacing_folder(tmp_path / "merged") as part:
            (part / "half").touch()
            raise StopHere

    killed(half)
    assert len(names(tmp_path)) == 2
    with replacing_folder(tmp_path / "merged") as part:
        (part / "whole").touch()
        with (
            pytest.raises(ArtifactError, match="another process is writing it"),
            replacing_folder(tmp_path / "merged"),
        ):
            pass
    assert names(tmp_path) == ["merged"]
    assert names(tmp_path / "merged") == ["whole"]


def test_a_folder_that_alone_was_set_aside_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".adapter.abcdefgh.old").mkdir()
    (tmp_path / ".adapter.abcdefgh.old" / "old").touch()
    clear_leftovers(tmp_path)
    assert names(tmp_path / "adapter") == ["old"]


def test_the_scratch_folder_goes_with_its_process_and_with_its_children() -> None:
    code = """
import multiprocessing
from tlora.files import scratch_folder

def child():
    (scratch_folder() / "rows").touch()
    print(scratch_folder(), flush=True)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
child()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [first, second] = map(Path, done.stdout.split())
    assert first != second
    assert not first.exists()
    assert not second.exists()
