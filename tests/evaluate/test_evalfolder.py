"""An evaluation's files: what a kill left is cleared, what was changed is refused."""

import pytest

from tlora.errors import ArtifactError
from tlora.evaluate.evalfolder import EvalFolder


@pytest.fixture
def folder(tmp_path):
    made = EvalFolder(tmp_path)
    made.write({"tasks": [{"name": "sums", "scores": {"base": 0.25}}]})
    made.write_samples("base", "sums", [{"item": "1"}])
    return made


def test_what_killed_processes_were_writing_is_removed(folder):
    folder.judgments.mkdir()
    before = {*folder.path.rglob("*"), folder.path / ".lock"}
    places = {
        folder.path: "eval.json",
        folder.samples / "base": "sums.jsonl",
        folder.judgments: "0123.json",
    }
    for place, name in places.items():
        (place / f".{name}.abcd_123.part").touch()
    with folder.locked():
        assert {*folder.path.rglob("*")} == before


def test_a_changed_score_is_refused(folder):
    file = folder.path / "eval.json"
    file.write_text(file.read_text().replace("0.25", "0.75"))
    with pytest.raises(ArtifactError, match=r"eval\.json: its content does not match its digest"):
        folder.read()


def test_changed_samples_are_refused(folder):
    digest = folder.write_samples("base", "sums", [{"item": "1", "scores": {"right": 0.0}}])
    assert folder.read_samples("base", "sums", digest) == folder.read_samples("base", "sums")
    file = folder.samples_file("base", "sums")
    file.write_text(file.read_text().replace("0.0", "1.0"))
    with pytest.raises(ArtifactError, match=r"sums\.jsonl: its content does not match its digest"):
        folder.read_samples("base", "sums", digest)


def test_a_sample_that_is_nested_too_deeply_is_damaged(folder):
    folder.samples_file("base", "sums").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"sums\.jsonl: missing or damaged"):
        folder.read_samples("base", "sums")
