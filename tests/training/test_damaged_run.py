"""What is damaged in a run is named or passed over; the weights come out as of a whole one."""

import json
import shutil

import pytest

from tlora import cli
from tlora.errors import ArtifactError
from tlora.integrity import has_digest
from tlora.training import train
from tlora.training.checkpoints import damage
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder


def weights(folder):
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def resumed(folder):
    return train.run(RunConfig(output_dir=str(folder.path), resume=True))


def flip(file, place=0.6):
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    file.write_bytes(content)


SPOILS = {
    "scheduler.pt is missing": lambda c: (c / "scheduler.pt").unlink(),
    "adapter_model.safetensors: its content": lambda c: flip(c / "adapter_model.safetensors"),
    "optimizer.pt: its content": lambda c: flip(c / "optimizer.pt"),
    "rng_state.pth: its content": lambda c: flip(c / "rng_state.pth"),
    "trainer_state.json: its content": lambda c: flip(c / "trainer_state.json"),
    "manifest.json is missing": lambda c: (c / "manifest.json").unlink(),
}


@pytest.mark.parametrize("said", SPOILS)
def test_a_damaged_checkpoint_gives_way_to_the_whole_one_before_it(cut, whole, said, caplog):
    folder = cut(step=5)
    SPOILS[said](folder.checkpoints / "checkpoint-4")
    assert weights(resumed(folder)) == whole("tlora")
    (warning,) = (r.getMessage() for r in caplog.records if "the run resumes" in r.getMessage())
    assert f"checkpoint-4/{said}" in warning
    assert warning.endswith("; the run resumes from checkpoint-2.")


def test_without_a_whole_checkpoint_a_run_starts_over_from_its_plan(cut, whole, caplog):
    folder = cut()
    flip(folder.checkpoints / "checkpoint-2/optimizer.pt")
    plan = folder.plan.read_bytes()
    assert weights(resumed(folder)) == whole("tlora")
    assert folder.plan.read_bytes() == plan
    assert "its content does not match its digest; the run starts over." in caplog.text


@pytest.mark.parametrize("place", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize(("method", "name"), [("tlora", "plan"), ("pissa", "initial")])
def test_a_damaged_plan_is_named(cut, method, name, place):
    folder = cut(method)
    flip(folder.path / f"{name}.safetensors", place)
    with pytest.raises(ArtifactError, match=rf"{name}\.safetensors: not a readable safetensors"):
        resumed(folder)


@pytest.fixture
def other_run(config):
    """Make a finished run with other fields, whose files are whole too."""
    return lambda method, **fields: train.run(config("other", method=method, **fields))


@pytest.mark.parametrize(("method", "name"), [("tlora", "plan"), ("pissa", "initial")])
def test_the_plan_of_another_run_is_refused(cut, other_run, whole, method, name):
    folder = cut(method)
    file = folder.path / f"{name}.safetensors"
    file.write_bytes((other_run(method, adapter={"r": 2}).path / file.name).read_bytes())
    with pytest.raises(ArtifactError, match=rf"{name}\.safetensors: it is not the plan that this"):
        resumed(folder)
    file.unlink()  # as the sentence says
    assert weights(resumed(folder)) == whole(method)


def test_the_checkpoint_of_another_run_is_passed_over(cut, other_run, whole, caplog):
    folder = cut("lora", step=5)
    newest = folder.checkpoints / "checkpoint-4"
    shutil.rmtree(newest)
    shutil.copytree(other_run("lora", seed=1).checkpoints / "checkpoint-4", newest)
    assert weights(resumed(folder)) == whole("lora")
    assert "manifest.json belongs to another run; the run resumes from checkpoint-2." in caplog.text


def test_a_copied_and_a_resumed_run_keep_their_id(cut):
    folder = cut()
    before = folder.run_id()
    assert before
    assert resumed(folder).run_id() == before


def test_an_edited_seed_is_refused_in_a_sentence(cut, capsys):
    folder = cut()
    file = folder.path / "run.json"
    text = file.read_text()
    assert '"seed": 0' in text
    file.write_text(text.replace('"seed": 0', '"seed": 1'))
    assert cli.main(["train", "--output_dir", str(folder.path), "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"{file}: its content does not match its digest, so it was edited or is" in said


def test_broken_notes_of_a_run_do_not_stop_it(cut, whole, caplog):
    folder = cut()
    (folder.path / "provenance.json").write_text('{"starts": ')
    lines = folder.log.read_bytes().splitlines(keepends=True)
    folder.log.write_bytes(b"".join([lines[0], b"\xff\xfe\n[1]\n", *lines[1:], b'{"step": 3, "l']))
    assert weights(resumed(folder)) == whole("tlora")
    assert "provenance.json is damaged; it is started over with this start." in caplog.text
    assert "log.jsonl: lines [2, 3, " in caplog.text
    assert len(json.loads((folder.path / "provenance.json").read_text())["starts"]) == 1
    steps = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_run_pickles_no_arguments_and_seals_what_it_leaves(cut):
    folder = resumed(cut())
    written = [path for path in folder.path.rglob("*") if path.is_file()]
    assert not [path for path in written if path.name.startswith("training_args")]
    assert has_digest(folder.adapter / "adapter_model.safetensors")
    checkpoints = sorted(folder.checkpoints.glob("checkpoint-*"))
    assert len(checkpoints) == 3
    assert [damage(path) for path in checkpoints] == [None] * 3
    manifest = json.loads((checkpoints[-1] / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }


def test_what_a_kill_left_half_written_takes_no_folder_and_is_removed(cut, config, whole):
    fresh = RunFolder(config("fresh").output_dir)
    for folder in (fresh, cut()):
        folder.path.mkdir(exist_ok=True)
        (folder.path / ".run.json.abcd_123.part").write_text('{"kind": ')
        (folder.path / ".adapter.abcd_123.part").mkdir()
        (folder.path / ".adapter.abcd_123.part/adapter_config.json").touch()
    fresh.refuse_unless_free()
    for finished in (train.run(config("fresh")), resumed(folder)):
        assert weights(finished) == whole("tlora")
        assert not [*finished.path.rglob("*.part")]
