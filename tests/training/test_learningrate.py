"""A run that is given no learning rate takes the method's, records it, and resumes with it."""

import dataclasses
import json

import pytest

from tlora.errors import ConfigError
from tlora.methods.learningrates import LearningRates
from tlora.registry import METHODS
from tlora.training import train


@pytest.fixture
def without(config):
    """A short run that is given no learning rate."""

    def make(**fields):
        made = config(**fields)
        trainer = {n: v for n, v in made.trainer.items() if n != "learning_rate"}
        return dataclasses.replace(made, trainer=trainer | {"max_steps": 2, "save_steps": 1})

    return make


def record(folder):
    return json.loads((folder.path / "run.json").read_text())


@pytest.mark.parametrize(("method", "rate"), [("tlora", 2e-3), ("full", 3e-4)])
def test_it_is_the_methods_and_a_line_says_that_it_is_not_tuned(without, caplog, method, rate):
    caplog.set_level("INFO", "tlora")
    adapter = {} if method == "full" else {"r": 4}
    folder = train.run(without(method=method, adapter=adapter))
    (line,) = [each for each in caplog.messages if each.startswith("learning rate")]
    assert line.startswith(f"learning rate {rate:g}: the default of {method!r} for a model of 9,")
    assert "not tuned for this task" in line
    assert record(folder)["config"]["trainer"]["learning_rate"] == rate
    assert record(folder)["settled"] == ["trainer.learning_rate"]
    logged = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert logged[0]["learning_rate"] == rate


def test_the_same_command_resumes_with_the_recorded_one(without, interrupted, monkeypatch, caplog):
    """Also where a later version of the method has another default."""
    folder = interrupted(without(), step=1)
    rates = LearningRates(tiny=1e-5, small=1e-5, large=1e-5, source="another version")
    method = METHODS.load("tlora")
    traits = dataclasses.replace(method.traits, learning_rates=rates)
    monkeypatch.setattr(method, "traits", traits)
    caplog.set_level("INFO", "tlora")
    caplog.clear()
    train.run(without())
    assert folder.finished
    assert record(folder)["config"]["trainer"]["learning_rate"] == 2e-3
    assert record(folder)["settled"] == ["trainer.learning_rate"]
    assert not [each for each in caplog.messages if each.startswith("learning rate")]
    train.run(without())  # nothing is left to do
    train.run(dataclasses.replace(without(), trainer=without().trainer | {"learning_rate": 2e-3}))
    with pytest.raises(ConfigError, match=r"`trainer.learning_rate` is 0.1, but .* with 0.002"):
        train.run(
            dataclasses.replace(without(), trainer=without().trainer | {"learning_rate": 0.1})
        )


def test_one_that_was_given_is_not_left_out_later(config, interrupted, without):
    interrupted(config(trainer={"max_steps": 4, "save_steps": 2}), step=3)
    with pytest.raises(ConfigError, match=r"`trainer\.learning_rate` is not given, but"):
        train.run(without())
