"""A run that was stopped, however hard, ends with the weights of one that was not."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from tlora.errors import ConfigError
from tlora.training import initialize, train
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder
from tlora.training.trainers import LogCallback


def weights(folder):
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(config_in, tmp_path_factory):
    """Return the folder of a run that Ctrl-C stopped after a step; made once."""

    @functools.cache
    def run(method, step):
        def stop(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

        path = tmp_path_factory.mktemp("stopped") / method
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LogCallback, "on_step_end", stop)
            train.run(config_in(path, method=method))
        return path

    return run


@pytest.fixture
def cut(stopped, tmp_path):
    """A copy of such a folder, for a test of its own: two steps are in a checkpoint."""

    def copy(method="tlora", step=3):
        return RunFolder(shutil.copytree(stopped(method, step), tmp_path / "run"))

    return copy


def resumed(folder):
    return train.run(RunConfig(output_dir=str(folder.path), resume=True))


def test_resumed_weights_equal_uninterrupted_ones_bit_for_bit(cut, whole, monkeypatch):
    """The folder is enough, nothing is calibrated again, half a checkpoint is passed over."""
    folder = cut()
    half = shutil.copytree(folder.checkpoints / "checkpoint-2", folder.checkpoints / "checkpoint-4")
    (half / "trainer_state.json").unlink()
    optimizer = half / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    plan = folder.plan.read_bytes()

    def fail(*_, **__):
        raise AssertionError("calibrated again")

    assert not folder.finished
    with monkeypatch.context() as patch:
        patch.setattr("tlora.calibration.probe.calibrate", fail)
        patch.setattr("tlora.calibrate", fail, raising=False)
        assert resumed(folder).finished
    assert weights(folder) == whole("tlora")
    assert folder.plan.read_bytes() == plan
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_method_without_a_plan_resumes_too(cut, whole):
    assert weights(resumed(cut("lora"))) == whole("lora")


def test_stopped_before_its_plan_was_saved_a_run_plans_the_same_again(cut, whole):
    folder = cut(step=1)
    assert folder.last_checkpoint() is None
    folder.plan.unlink()
    assert weights(resumed(folder)) == whole("tlora")


def test_resuming_with_another_field_is_refused_and_all_are_named(cut, config):
    cut()
    other = config(resume=True, seed=4, trainer={"learning_rate": 0.5, "logging_steps": 3})
    with pytest.raises(ConfigError) as caught:
        train.run(other)
    named = [fault.split("`")[1] for fault in caught.value.faults]
    assert named == ["trainer.learning_rate", "seed"]
    assert "`seed` is 4, but the run was started with 0; leave it out" in str(caught.value)


def test_a_finished_run_is_left_alone_and_a_second_start_is_refused(cut, config, caplog):
    folder = cut()
    with pytest.raises(ConfigError, match="an unfinished run; add --resume"):
        train.run(config())
    folder.finish()
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert train.run(config(resume=True)).finished
    assert "holds a finished run; there is nothing to resume" in caplog.text
    with pytest.raises(ConfigError, match="a finished run; choose another --output_dir"):
        train.run(config())
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


@pytest.mark.parametrize("stage", [train, initialize])
def test_a_folder_that_a_process_is_at_is_refused(config, stage):
    started = RunFolder(config("new").output_dir)
    with started.locked(), pytest.raises(ConfigError, match="another process is at the run in it"):
        stage.run(config("new"))


def test_resuming_beside_a_live_run_is_refused_and_touches_nothing(cut):
    folder = cut()
    half = folder.checkpoints / "checkpoint-4"  # as a live run writes one
    half.mkdir()
    with folder.locked(), pytest.raises(ConfigError, match="wait for it, or choose another"):
        resumed(folder)
    assert half.is_dir()


@pytest.mark.parametrize("name", ["train_file", "model"])
def test_resuming_on_other_rows_or_another_model_is_refused(cut, tmp_path, name):
    folder = cut()
    run = json.loads((folder.path / "run.json").read_text())
    other = tmp_path / "other"
    if name == "model":
        shutil.copytree(run["config"]["model"], other)
        (other / "model.safetensors").write_bytes(b"other")
    else:
        other.write_text(Path(run["config"]["train_file"]).read_text().replace("so", "no"))
    run["config"][name] = str(other)
    (folder.path / "run.json").write_text(json.dumps(run))
    before = sorted(folder.path.rglob("*"))
    for gone in (False, True):
        if gone:
            other.rename(tmp_path / "gone")
        with pytest.raises(ConfigError) as caught:
            resumed(folder)
        (fault,) = caught.value.faults
        assert fault.startswith(f"`{name}`, {other}, has changed or is gone since")
    assert sorted(folder.path.rglob("*")) == before
