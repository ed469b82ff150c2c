"""Every registered method by `tlora train`: from nothing to an adapter, and on after a stop."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from running import small_options

import tlora
import tlora.demo
from tlora.errors import ConfigError
from tlora.registry import METHODS
from tlora.training import initialize, train
from tlora.training.arguments import training_arguments
from tlora.training.runconfig import CalibrationConfig, RunConfig
from tlora.training.runfolder import RunFolder
from tlora.training.setup import settle

BASE = str(Path(tlora.demo.__file__).parent / "base")
NAMES = ["tlora", "full", "adalora", "pissa", "eva", "trimatrix", "loraplus", "houlsby", "rac-lora"]
"""One of each way to prepare, train and save; tests/contracts/test_methods.py has them all."""


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Make a run of a method on the base that the package ships."""
    rows = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    lines = [{"prompt": f"{n} + {n} =", "response": f" {n + n}"} for n in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(name, folder, steps=2, resume=False):
        method = METHODS.load(name)
        options = {
            key: value
            for key, value in dataclasses.asdict(small_options(method, "CAUSAL_LM")).items()
            if value != getattr(method.options(), key) and key != "task_type"
        }
        return RunConfig(
            model=BASE,
            train_file=str(rows),
            output_dir=str(folder),
            method=name,
            seed=3,
            resume=resume,
            adapter=options,
            calibration=CalibrationConfig(samples=8, batch_size=4),
            trainer={
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "save_steps": 2,
                "logging_steps": 1,
                "disable_tqdm": True,
                "use_cpu": True,
            },
        )

    return make


@pytest.fixture(scope="session")
def probe():
    """Return the logits of a prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("7 + 7 = 14", return_tensors="pt")["input_ids"]

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    return logits


def load(folder, traits):
    if traits.leaves == "model":
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    load_adapter = tlora.load_adapter if traits.leaves == "own" else peft.PeftModel.from_pretrained
    return load_adapter(base, folder)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_leaves_what_it_says(config, probe, tmp_path, name, monkeypatch):
    models = []
    make_trainer = train.make_trainer

    def keep(setup, prepared, *rest):
        models.append(prepared.model)
        return make_trainer(setup, prepared, *rest)

    monkeypatch.setattr(train, "make_trainer", keep)
    folder = train.run(config(name, tmp_path / "run"))
    assert folder.finished
    again = load(folder.adapter, METHODS.load(name).traits)
    torch.testing.assert_close(probe(again), probe(models[0]), rtol=1e-4, atol=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    assert not torch.equal(probe(again), probe(base))
    assert (folder.adapter / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_init_leaves_what_changes_nothing_yet(config, probe, tmp_path, name):
    folder = initialize.run(config(name, tmp_path / "run"))
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    again = load(folder.adapter, METHODS.load(name).traits)
    torch.testing.assert_close(probe(again), probe(base), rtol=1e-4, atol=1e-4)


def test_the_trainer_takes_the_optimizer_of_the_method(config, tmp_path):
    setup = settle(config("loraplus", tmp_path / "run"))
    arguments = training_arguments(setup, tmp_path / "checkpoints")
    prepared = initialize.adapt(setup, "cpu")
    trainer = train.make_trainer(setup, prepared, arguments, RunFolder(tmp_path / "run"))
    trainer.create_optimizer_and_scheduler(2)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {1e-2, 16e-2}


def with_rite(config):
    return dataclasses.replace(config, trainer=config.trainer | {"optim": "lora_rite"})


def test_any_method_that_trains_b_takes_lora_rite_by_the_trainers_field(config, tmp_path):
    folder = train.run(with_rite(config("tlora", tmp_path / "run")))
    state = torch.load(folder.last_checkpoint() / "optimizer.pt", weights_only=True)
    pairs = next(group for group in state["param_groups"] if group["pairs"])
    # A is frozen: only every second factor, B, has moved.
    assert sorted(state["state"]) == pairs["params"][1::2]


@pytest.mark.parametrize(
    ("name", "fault"),
    [("full", "'full' trains none"), ("loraplus", "replace the optimizer of the method")],
)
def test_lora_rite_is_refused_where_it_cannot_be(config, tmp_path, name, fault):
    with pytest.raises(ConfigError, match=fault):
        train.run(with_rite(config(name, tmp_path / "run")))


@pytest.mark.parametrize(
    "name",
    [
        *("adalora", "trimatrix", "lorta", "loraplus", "lora-rite", "pissa", "full"),
        *("qa-lora", "peft:vera", "houlsby", "rac-lora"),
    ],
)
def test_a_stopped_run_ends_with_the_same_weights(config, interrupted, tmp_path, name):
    whole = train.run(config(name, tmp_path / "whole", steps=5))
    folder = interrupted(config(name, tmp_path / "cut", steps=5), 3)
    assert folder.last_checkpoint().name == "checkpoint-2"
    resumed = train.run(config(name, tmp_path / "cut", steps=5, resume=True))
    assert _weights(resumed) == _weights(whole)


def _weights(folder):
    [file] = folder.adapter.glob("*model.safetensors")
    return file.read_bytes()
