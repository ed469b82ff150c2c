import importlib.metadata
import json
import os
import subprocess

import pytest

from tlora.errors import ArtifactError, ConfigError
from tlora.training.runfolder import RunFolder, git_state, provenance


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_a_new_path_and_an_empty_folder_are_free(folder):
    folder.refuse_unless_free()
    folder.path.mkdir()
    folder.refuse_unless_free()
    assert not any(folder.path.iterdir())


def test_a_lock_file_that_a_killed_process_left_takes_no_folder(folder):
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    folder.refuse_unless_free()
    with folder.locked():
        folder.refuse_unless_free()
    assert not any(folder.path.iterdir())


def test_a_lock_leaves_no_folder_that_was_not_there(tmp_path):
    (tmp_path / "old").mkdir()
    for path in ("old/a/b", "old"):
        with RunFolder(tmp_path / path).locked():
            assert (tmp_path / path / ".lock").is_file()
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


def test_a_run_that_is_refused_late_leaves_no_folder(folder):
    with pytest.raises(ConfigError), folder.locked():
        folder.checkpoints.mkdir(parents=True)
        raise ConfigError("too late")
    assert not folder.path.exists()
    with folder.locked():
        (folder.checkpoints / "checkpoint-1").mkdir(parents=True)
    assert (folder.checkpoints / "checkpoint-1").is_dir()


def test_the_first_rank_holds_the_lock_for_all(folder, monkeypatch):
    with folder.locked():
        monkeypatch.setenv("RANK", "1")
        with folder.locked():
            pass
        assert (folder.path / ".lock").is_file()


def test_a_folder_with_other_things_is_refused(folder):
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run; choose another"):
        folder.refuse_unless_free()


def test_a_folder_without_the_right_to_write_is_refused(folder, monkeypatch):
    # The answer of the system is replaced: to root, as which containers run, it grants everything.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written to; choose another"):
        folder.refuse_unless_free()


def test_a_file_is_refused(folder):
    folder.path.write_text("mine")
    with pytest.raises(ConfigError, match="is a file; choose another --output_dir"):
        folder.refuse_unless_free()


def test_a_run_file_of_something_else_is_named(folder):
    folder.path.mkdir()
    (folder.path / "run.json").write_text('{"kind": "bicycle"}')
    with pytest.raises(ArtifactError, match=r"run\.json: not written by `tlora`"):
        folder.config()


def test_each_start_adds_its_provenance(folder):
    folder.start({"seed": 3}, verb="train")
    folder.start({"seed": 3}, verb="train")
    starts = json.loads((folder.path / "provenance.json").read_text())["starts"]
    assert [start["seed"] for start in starts] == [3, 3]


def test_provenance_says_what_ran_and_where():
    record = provenance(seed=7)
    assert record["seed"] == 7
    assert record["packages"]["torch"] == importlib.metadata.version("torch")
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_bytes"] > 2**20
    assert json.loads(json.dumps(record)) == record


def test_git_state_is_the_commit_and_whether_other_files_changed(tmp_path):
    assert git_state(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    results = tmp_path / "results" / "a [b]"
    results.mkdir(parents=True)
    (results / "run.json").write_text("1")
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (results / "run.json").write_text("2")
    (results / "more.json").write_text("3")
    for folder in (tmp_path, tmp_path / "results"):
        assert git_state(folder, results)["dirty"] is False
        assert git_state(folder, tmp_path)["dirty"] is True
    (tmp_path / "results" / "a [b] beside").write_text("4")
    assert git_state(tmp_path, str(results)) == clean | {"dirty": True}


def test_rewinding_the_log_drops_later_lines_and_a_broken_last_one(folder):
    folder.path.mkdir()
    folder.rewind_log(0)
    for step in (1, 2, 3):
        folder.append_log({"step": step, "loss": step / 2})
    with folder.log.open("a") as file:
        file.write('{"step": 2, "lo')
    folder.rewind_log(2)
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
