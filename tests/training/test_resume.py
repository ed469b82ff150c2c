"""A run that was stopped, however hard, ends with the weights of one that was not."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tlora.errors import ConfigError
from tlora.training import initialize, train
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder


def weights(folder):
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("method", "step"), [("tlora", 1), ("tlora", 3), ("lora", 1), ("lora", 5)])
def test_resumed_weights_equal_uninterrupted_ones_bit_for_bit(
    config, interrupted, whole, method, step
):
    folder = interrupted(config("cut", method=method), step)
    assert not folder.finished
    assert (folder.last_checkpoint() is None) == (step == 1)
    plan = folder.plan.read_bytes() if folder.plan.is_file() else None
    resumed = train.run(config("cut", method=method, resume=True))
    assert weights(resumed) == whole(method)
    assert plan == (folder.plan.read_bytes() if folder.plan.is_file() else None)
    steps = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_does_not_calibrate_again(config, interrupted, monkeypatch):
    interrupted(config(), 3)

    def fail(*_, **__):
        raise AssertionError("calibrated again")

    monkeypatch.setattr("tlora.calibration.probe.calibrate", fail)
    monkeypatch.setattr("tlora.calibrate", fail, raising=False)
    assert train.run(config(resume=True)).finished


def test_stopped_before_its_plan_was_saved_a_run_plans_the_same_again(config, interrupted, whole):
    folder = interrupted(config(), 1)
    folder.plan.unlink()
    assert weights(train.run(config(resume=True))) == whole("tlora")


def test_a_classifiers_head_resumes_too(config, interrupted, saved, tiny_bert_classifier, tmp_path):
    rows = tmp_path / "train.tsv"
    rows.write_text("sentence\tlabel\n" + "\n".join(f"text {n}\t{n % 2}" for n in range(12)))
    fields = {"model": saved(tiny_bert_classifier()), "task": "sst2", "train_file": str(rows)}
    whole = train.run(config("whole", **fields))
    interrupted(config("cut", **fields), 3)
    resumed = train.run(config("cut", **fields, resume=True))
    assert any(
        "classifier" in key for key in load_file(resumed.adapter / "adapter_model.safetensors")
    )
    assert weights(resumed) == weights(whole)


KILLED = """
import os, signal, sys, transformers
from tlora.training.runconfig import RunConfig
from tlora.training import initialize, train
import json

save = transformers.Trainer._save_optimizer_and_scheduler

def half(self, output_dir):
    save(self, output_dir)
    if self.state.global_step == 4:
        path = os.path.join(output_dir, "optimizer.pt")
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

transformers.Trainer._save_optimizer_and_scheduler = half
train.run(RunConfig.from_dict(json.loads(sys.argv[1])))
"""


def test_killed_while_writing_a_checkpoint_the_one_before_is_used(config, whole):
    cut = config("cut", trainer={"save_total_limit": 1})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(cut.to_dict())],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    folder = RunFolder(cut.output_dir)
    assert (folder.checkpoints / "checkpoint-4").is_dir()
    assert folder.last_checkpoint().name == "checkpoint-2"
    resumed = train.run(config("cut", resume=True))
    assert weights(resumed) == whole("tlora")


def test_resuming_needs_only_the_folder(config, interrupted, whole):
    folder = interrupted(config("cut"), 3)
    resumed = train.run(RunConfig(output_dir=str(folder.path), resume=True))
    assert weights(resumed) == whole("tlora")


def test_resuming_with_another_field_is_refused_and_all_are_named(config, interrupted):
    interrupted(config(), 3)
    other = config(resume=True, seed=4, trainer={"learning_rate": 0.5, "logging_steps": 3})
    with pytest.raises(ConfigError) as caught:
        train.run(other)
    named = [fault.split("`")[1] for fault in caught.value.faults]
    assert named == ["trainer.learning_rate", "seed"]
    assert "`seed` is 4, but the run was started with 0; leave it out" in str(caught.value)


def test_resuming_a_finished_run_leaves_it_alone_and_says_so(config, caplog):
    folder = train.run(config())
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert train.run(config(resume=True)).finished
    assert "holds a finished run; there is nothing to resume" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_resuming_where_there_is_no_run_starts_one(config):
    assert train.run(config(resume=True)).finished


def test_a_second_start_in_a_folder_is_refused(config, interrupted):
    folder = interrupted(config(), 3)
    with pytest.raises(ConfigError, match="an unfinished run; add --resume"):
        train.run(config())
    train.run(config(resume=True))
    with pytest.raises(ConfigError, match="a finished run; choose another --output_dir"):
        train.run(config())
    assert Path(folder.path, "run.json").is_file()


@pytest.mark.parametrize("stage", [train, initialize])
def test_a_folder_that_a_process_is_at_is_refused(config, stage):
    started = RunFolder(config("new").output_dir)
    with started.locked(), pytest.raises(ConfigError, match="another process is at the run in it"):
        stage.run(config("new"))


def test_resuming_beside_a_live_run_is_refused_and_touches_nothing(config, interrupted):
    folder = interrupted(config(), 3)
    half = folder.checkpoints / "checkpoint-4"  # as a live run writes one
    half.mkdir()
    with folder.locked(), pytest.raises(ConfigError, match="wait for it, or choose another"):
        train.run(config(resume=True))
    assert half.is_dir()
    assert train.run(config(resume=True)).finished


@pytest.fixture
def own(config, llama_folder, other_sums, tmp_path):
    """A run on copies of rows and model, which a test may change."""
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    files = {"train_file": tmp_path / "rows.jsonl", "eval_file": tmp_path / "others.jsonl"}
    for file, source in zip(files.values(), (config().train_file, other_sums), strict=True):
        shutil.copy(source, file)
    return config(model=str(model), **{name: str(file) for name, file in files.items()})


def changed(path):
    path.write_text(path.read_text().replace("so", "no"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train_file", lambda own: changed(Path(own.train_file))),
        ("eval_file", lambda own: Path(own.eval_file).unlink()),
        ("model", lambda own: (Path(own.model) / "model.safetensors").write_bytes(b"other")),
    ],
)
def test_resuming_on_other_rows_or_another_model_is_refused(own, interrupted, name, change):
    folder = interrupted(own, 3)
    before = sorted(folder.path.rglob("*"))
    change(own)
    with pytest.raises(ConfigError) as caught:
        train.run(RunConfig(output_dir=own.output_dir, resume=True))
    (fault,) = caught.value.faults
    assert fault.startswith(f"`{name}`, {getattr(own, name)}, has changed or is gone since")
    assert sorted(folder.path.rglob("*")) == before


def test_resuming_a_run_without_digests_goes_on_as_before(own, interrupted):
    folder = interrupted(own, 3)
    run = json.loads((folder.path / "run.json").read_text())
    del run["inputs"]
    (folder.path / "run.json").write_text(json.dumps(run))
    changed(Path(own.train_file))
    assert train.run(RunConfig(output_dir=own.output_dir, resume=True)).finished
