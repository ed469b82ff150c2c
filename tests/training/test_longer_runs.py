"""A finished run that is given more steps or epochs trains on from its last checkpoint."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest

from tlora.errors import ConfigError
from tlora.training import initialize, train
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder


@pytest.fixture(scope="module")
def finished(config_in, tmp_path_factory):
    """Return a copy of a finished run of a few steps; each is made once."""

    @functools.cache
    def made(**trainer):
        folder = tmp_path_factory.mktemp("finished") / "run"
        return train.run(config_in(folder, trainer=trainer)).path

    return lambda path, **trainer: RunFolder(shutil.copytree(made(**trainer), path))


def losses(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines if "loss" in line}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_more_steps_extend_it_and_a_line_tells_of_the_schedule(
    finished, config, caplog, resume, schedule
):
    caplog.set_level("INFO", "tlora")
    trainer = {"max_steps": 4, "lr_scheduler_type": schedule}
    longer = config(trainer=trainer | {"max_steps": 8})
    folder = finished(longer.output_dir, **trainer)
    before = (folder.adapter / "adapter_model.safetensors").read_bytes()
    if resume:
        command = RunConfig(output_dir=longer.output_dir, resume=True, trainer={"max_steps": 8})
    else:
        command = longer
    assert train.run(command).finished
    assert folder.config()["trainer"]["max_steps"] == 8
    assert (folder.adapter / "adapter_model.safetensors").read_bytes() != before
    rates = losses(folder)
    assert [*rates] == [1, 2, 3, 4, 5, 6, 7, 8]
    (line,) = [each for each in caplog.messages if "Training continues at step 4." in each]
    if schedule == "linear":
        assert line.endswith("so the result differs from a single 8-step run.")
        assert rates[6] > rates[4]
    else:
        assert line.endswith("The learning rate stays the same.")
        assert len({*rates.values()}) == 1
    caplog.clear()
    train.run(command)
    assert "is already finished." in caplog.text


def test_at_a_constant_rate_it_ends_with_the_weights_of_one_run(finished, config, tmp_path):
    trainer = {"max_steps": 4, "lr_scheduler_type": "constant"}
    longer = config(trainer=trainer | {"max_steps": 8})
    folder = finished(longer.output_dir, **trainer)
    train.run(longer)
    whole = train.run(dataclasses.replace(longer, output_dir=str(tmp_path / "whole")))
    weights = [run.adapter / "adapter_model.safetensors" for run in (folder, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_more_epochs_extend_it_too(finished, config):
    epochs = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    longer = config(trainer=epochs | {"num_train_epochs": 2})
    folder = finished(longer.output_dir, **epochs)
    assert max(losses(folder)) == 3
    train.run(longer)
    assert max(losses(folder)) == 6


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        ({"max_steps": 3}, "`trainer.max_steps` is 3, but"),
        ({"max_steps": -1}, "`trainer.max_steps` is -1, but"),
        ({"max_steps": 4, "num_train_epochs": 9}, "`trainer.num_train_epochs` is 9, but"),
        ({"max_steps": 8, "learning_rate": 0.5}, "`trainer.learning_rate` is 0.5, but"),
        ({"max_steps": "many"}, "`trainer.max_steps` is 'many', but"),
    ],
)
def test_fewer_steps_and_other_values_are_refused(finished, config, trainer, named):
    other = config(trainer=trainer)
    folder = finished(other.output_dir, max_steps=4)
    with pytest.raises(ConfigError) as caught:
        train.run(other)
    assert [fault.startswith(named) for fault in caught.value.faults] == [True]
    assert folder.finished


def test_an_unfinished_run_and_an_initialization_keep_their_length(cut, config):
    cut()
    with pytest.raises(ConfigError, match=r"`trainer\.max_steps` is 9, but"):
        train.run(config(trainer={"max_steps": 9}))
    made = config("init", trainer={"max_steps": 1})
    initialize.run(made)
    with pytest.raises(ConfigError, match=r"`trainer\.max_steps` is 9, but"):
        initialize.run(config("init", trainer={"max_steps": 9}))


def test_one_that_stopped_early_is_not_trained_longer(config, other_sums, monkeypatch):
    early = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-12}
    fields = {"eval_file": other_sums, "early_stopping": 1}
    folder = train.run(config(trainer=early | {"save_steps": 2}, **fields))
    assert max(losses(folder)) < 6
    with pytest.raises(ConfigError, match=f"{folder.path} stopped early; train its adapter"):
        train.run(config(trainer=early | {"save_steps": 2, "max_steps": 9}, **fields))


def test_without_a_checkpoint_it_cannot_be_extended(finished, config):
    none = {"max_steps": 4, "save_strategy": "no"}
    longer = config(trainer=none | {"max_steps": 8})
    folder = finished(longer.output_dir, **none)
    said = f"is finished and has no checkpoint to resume from; .* --continue_from {folder.path}"
    with pytest.raises(ConfigError, match=said):
        train.run(longer)
    assert folder.finished
    assert Path(folder.adapter).is_dir()
