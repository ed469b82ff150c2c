"""A comparison's files: what a kill left is cleared, what was changed is refused."""

import json

import pytest

from tlora.compare.comparefolder import CompareFolder
from tlora.errors import ArtifactError


@pytest.fixture
def folder(tmp_path):
    made = CompareFolder(tmp_path)
    made.start({"metric": "loss"})
    made.write_record("lora", {"status": "finished", "scores": {"loss": 0.5}})
    return made


def test_what_killed_processes_were_writing_is_removed(folder):
    folder.adapters.mkdir()
    before = {*folder.path.rglob("*"), folder.path / ".lock"}
    for place, name in ((folder.path, "compare.json"), (folder.runs, "lora.json")):
        (place / f".{name}.abcd_123.part").touch()
    (folder.adapters / ".lora.abcd_123.part").mkdir()
    with folder.locked():
        assert {*folder.path.rglob("*")} == before
    assert folder.record("lora")["scores"] == {"loss": 0.5}


def test_a_changed_record_is_named_with_the_way_out(folder):
    file = folder.record_file("lora")
    file.write_text(file.read_text().replace("0.5", "0.4"))
    with pytest.raises(
        ArtifactError, match=r"lora\.json: its content does not .* remove it to repeat its run"
    ):
        folder.record("lora")
    file.write_text("{")
    with pytest.raises(ArtifactError, match=r"lora\.json: not JSON .* remove it to repeat its run"):
        folder.record("lora")


def test_the_record_of_another_run_is_named(folder):
    folder.write_record("dora", {"status": "finished", "scores": {"loss": 0.9}})
    folder.record_file("lora").write_bytes(folder.record_file("dora").read_bytes())
    assert folder.record("dora")["scores"] == {"loss": 0.9}
    with pytest.raises(ArtifactError, match=r"lora\.json: this is the record of .* 'dora'; remove"):
        folder.record("lora")


def test_a_changed_comparison_is_named(folder):
    file = folder.path / "compare.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metric": "f1"}))
    with pytest.raises(ArtifactError, match=r"compare\.json: its content does not match"):
        folder.read()
