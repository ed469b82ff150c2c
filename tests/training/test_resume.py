"""The same command again: a run that was stopped ends with the weights of one that was not."""

import dataclasses
import functools
import json
import shutil
import types
from pathlib import Path

import pytest

from tlora.calibration.budget import MemoryBudget
from tlora.errors import ConfigError
from tlora.files import write_state
from tlora.tasks.dataconfig import DataConfig
from tlora.training import initialize, train
from tlora.training.resume import merge_saved
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder
from tlora.training.setup import settle

STAGES = {"train": train, "init": initialize}


def weights(folder):
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


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
        patch.setattr("tlora.adapter.attach.made_plan", fail)
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


def test_a_run_that_plans_again_keeps_the_budget_that_it_found(cut, whole, monkeypatch):
    """On another machine too: run.json has what "auto" came to."""
    folder = cut(step=1)
    record = folder.calibration()
    assert (record["memory_budget"], record["passes"]) == (None, 1)
    assert record == folder.saved_plan().info["calibration"]
    folder.plan.unlink()
    asked = []

    def resolved(config, *_):
        asked.append(config.memory_budget)
        return MemoryBudget(1 if config.memory_budget == "auto" else config.memory_budget)

    monkeypatch.setattr("tlora.adapter.blocks.resolved", resolved)
    assert weights(resumed(folder)) == whole("tlora")
    assert asked == [None]
    assert folder.config()["adapter"]["memory_budget"] == "auto"
    assert folder.calibration()["memory_budget"] is None


@pytest.mark.parametrize("method", ["tlora", "lora"])
def test_the_same_command_again_resumes_and_says_from_where(cut, config, whole, caplog, method):
    caplog.set_level("INFO", "tlora")
    folder = cut(method)
    run = train.run(config(method=method, trainer={"logging_steps": 3, "save_steps": 4}))
    assert weights(run) == whole(method)
    assert f"Resuming {folder.path} at step 2." in caplog.text


def test_without_a_whole_checkpoint_it_starts_over_and_says_so(cut, config, whole, caplog):
    caplog.set_level("INFO", "tlora")
    folder = cut(step=1)
    assert weights(train.run(config())) == whole("tlora")
    assert f"the run in {folder.path} starts over: it has no whole checkpoint." in caplog.text


def test_without_a_whole_checkpoint_another_configuration_starts_over(
    cut, config, tmp_path, caplog
):
    caplog.set_level("INFO", "tlora")
    folder = cut(step=1)
    corrected = {"seed": 4, "trainer": {"learning_rate": 0.5}}
    expected = train.run(config(output_dir=str(tmp_path / "elsewhere"), **corrected))
    run = train.run(config(**corrected))
    assert weights(run) == weights(expected)
    assert run.config()["seed"] == 4 and run.finished
    assert f"the run in {folder.path} starts over with this configuration." in caplog.text


def test_a_folder_that_a_run_left_before_it_wrote_its_record_is_free(config, whole):
    folder = RunFolder(config().output_dir)
    folder.checkpoints.mkdir(parents=True)
    (folder.path / ".lock").touch()
    assert weights(train.run(config())) == whole("tlora")


@pytest.mark.parametrize("resume", [True, False])
def test_another_configuration_is_refused_and_all_fields_are_named(cut, config, resume):
    folder = cut()
    before = contents(folder)
    other = config(resume=resume, seed=4, trainer={"learning_rate": 0.5, "logging_steps": 3})
    with pytest.raises(ConfigError) as caught:
        train.run(other)
    named = [fault.split("`")[1] for fault in caught.value.faults]
    # The method's own seed follows the run's; where it is not written out, the run's is kept.
    assert set(named) == {"trainer.learning_rate", "seed"} | (set() if resume else {"adapter.seed"})
    assert (
        f"`seed` is 4, but {folder.path} was started with 0; use the same value, or another"
        " --output_dir."
    ) in caught.value.faults
    assert contents(folder) == before


def test_what_is_left_out_is_another_configuration_unless_resume_takes_it_from_the_run(config):
    saved = RunConfig.from_dict(config(trainer={"warmup_steps": 2}, seed=3).resolved().to_dict())
    with pytest.raises(ConfigError) as caught:
        merge_saved(config(method="lora", seed=3), saved)
    faults = {fault.split("`")[1]: fault for fault in caught.value.faults}
    assert faults["trainer.warmup_steps"].startswith("`trainer.warmup_steps` is not given, but")
    assert faults["method"].startswith("`method` is 'lora', but")
    assert not any(name.startswith("adapter.") for name in faults)
    merged = merge_saved(RunConfig(resume=True, output_dir="there"), saved)
    assert (merged.output_dir, merged.seed, merged.trainer) == ("there", 3, saved.trainer)
    assert merged.adapter == saved.adapter


def test_the_classes_that_a_run_settled_on_stay(config, saved, tiny_bert_classifier, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text(
        "text,label\n" + "\n".join(f"x {n},{'no' if n % 2 else 'yes'}" for n in range(8))
    )
    same = config(
        model=saved(tiny_bert_classifier()),
        train_file=str(rows),
        data=DataConfig(kind="classification", text_column="text", label_column="label"),
    )
    record = json.loads(json.dumps(settle(same).record()))
    assert record["data"]["label_names"] == ["no", "yes"]
    merged = merge_saved(same, RunConfig.from_dict(record))
    assert merged.data.label_names == ["no", "yes"]


def test_rows_that_lie_elsewhere_now_are_the_same_rows(cut, config, whole, tmp_path):
    folder = cut()
    moved = shutil.copy(config().train_file, tmp_path / "moved.jsonl")
    assert weights(train.run(config(train_file=str(moved)))) == whole("tlora")
    assert folder.config()["train_file"] == str(moved)
    other = tmp_path / "other.jsonl"
    other.write_text(moved.read_text().replace("so", "no"))
    with pytest.raises(ConfigError, match=r"`train_file` is '.*other\.jsonl', but .* started with"):
        train.run(config(train_file=str(other)))


@pytest.mark.parametrize("verb", STAGES)
@pytest.mark.parametrize("fields", [{}, {"model": None, "train_file": None}])
def test_where_there_is_none_resume_is_refused_and_leaves_nothing(config, verb, fields):
    there = config(resume=True, **fields)
    noun = {"train": "run", "init": "initialization"}[verb]
    said = (
        f"run: there is no {noun} in {there.output_dir} to resume; remove --resume to start one,"
        " or name its folder by --output_dir."
    )
    with pytest.raises(ConfigError) as caught:
        STAGES[verb].run(there)
    assert str(caught.value) == said
    assert not Path(there.output_dir).exists()


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}


@pytest.fixture(scope="module")
def finished(config_in, tmp_path_factory):
    """Return a copy of a finished run of a verb; each is made once."""

    @functools.cache
    def made(verb):
        folder = tmp_path_factory.mktemp("finished") / verb
        return STAGES[verb].run(config_in(folder, trainer={"max_steps": 1})).path

    return lambda verb, path: RunFolder(shutil.copytree(made(verb), path))


@pytest.mark.parametrize("verb", STAGES)
def test_of_a_finished_run_nothing_is_left_to_do(finished, config, verb, caplog, monkeypatch):
    caplog.set_level("INFO", "tlora")
    same = config(trainer={"max_steps": 1})
    folder = finished(verb, same.output_dir)
    before = contents(folder)
    commands = [same, dataclasses.replace(same, resume=True)]
    commands.append(RunConfig(output_dir=same.output_dir, resume=True))
    for command in commands:
        caplog.clear()
        assert STAGES[verb].run(command).finished
        assert [record.getMessage() for record in caplog.records] == [
            f"The run in {folder.path} is already finished. To train it longer, raise --epochs or"
            " --max_steps."
            if verb == "train"
            else f"The initialization in {folder.path} is already finished."
        ]
    monkeypatch.setenv("RANK", "1")  # as every process of a launch does
    assert STAGES[verb].run(same).finished
    monkeypatch.delenv("RANK")
    with pytest.raises(
        ConfigError, match=r"`seed` is 4, but .* was started with 0; use the same value"
    ):
        STAGES[verb].run(dataclasses.replace(same, seed=4))
    with pytest.raises(ConfigError, match="`model` is missing; give the whole command again, or"):
        STAGES[verb].run(RunConfig(output_dir=same.output_dir))
    assert contents(folder) == before


@pytest.mark.parametrize(("verb", "other"), [("train", "init"), ("init", "train")])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_the_other_verb_is_refused(finished, config, verb, other, resume):
    same = config(trainer={"max_steps": 1}, resume=resume)
    folder = finished(other, same.output_dir)
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        STAGES[verb].run(same)
    held = {"train": "run", "init": "initialization"}[other]
    assert str(caught.value) == (
        f"output_dir: {folder.path} holds the {held} of `tlora {other}`, which `tlora {verb}` does"
        " not continue; choose another --output_dir."
    )
    assert contents(folder) == before


@pytest.mark.parametrize("resume", [True, False])
def test_an_unfinished_initialization_starts_clean(finished, config, resume, caplog):
    caplog.set_level("INFO", "tlora")
    same = config(trainer={"max_steps": 1})
    folder = finished("init", same.output_dir)
    adapter = weights(folder)
    plan = folder.plan.read_bytes()
    folder.start(folder.config(), "init", None, folder.inputs())
    folder.plan.write_bytes(b"of the killed one")
    (folder.adapter / "stray").touch()
    with pytest.raises(ConfigError, match="`seed` is 4"):
        initialize.run(dataclasses.replace(same, seed=4, resume=resume))
    again = RunConfig(output_dir=same.output_dir, resume=True) if resume else same
    assert initialize.run(again).finished
    assert f"{folder.path} was not finished; it starts over." in caplog.text
    assert folder.plan.read_bytes() == plan
    assert weights(folder) == adapter
    assert not (folder.adapter / "stray").exists()
    starts = json.loads((folder.path / "provenance.json").read_text())["starts"]
    assert len(starts) == 1


def test_machines_that_do_not_share_the_folder_are_named(cut, config, monkeypatch):
    folder = cut()
    group = types.SimpleNamespace(all_gather=lambda found: [found, not found])
    monkeypatch.setattr("tlora.calibration.group.process_group", lambda: group)
    with pytest.raises(ConfigError, match="put --output_dir on a shared file system"):
        train.run(config())
    assert folder.exists


@pytest.mark.parametrize("stage", [train, initialize])
def test_a_folder_that_a_process_is_at_is_refused(config, stage):
    started = RunFolder(config("new").output_dir)
    with started.locked(), pytest.raises(ConfigError, match="another process is using this run"):
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
    del run["digest"]
    write_state(folder.path / "run.json", run)
    before = sorted(folder.path.rglob("*"))
    for gone in (False, True):
        if gone:
            other.rename(tmp_path / "gone")
        with pytest.raises(ConfigError) as caught:
            resumed(folder)
        (fault,) = caught.value.faults
        says = (
            "is missing; restore it, or give its new path" if gone else "has changed since the run"
        )
        assert fault.startswith(f"`{name}`, {other}, {says}")
    assert sorted(folder.path.rglob("*")) == before
