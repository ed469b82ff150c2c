"""`continue_from` trains an adapter further: A stays frozen where it was, nothing is calibrated."""

import dataclasses
import functools
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tlora import cli
from tlora.errors import ConfigError, MisfitError, TLoraError
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train
from tlora.training.continuing import with_adapter
from tlora.training.runconfig import CalibrationConfig, RunConfig, TokensConfig
from tlora.verbconfig import InitConfig


@pytest.fixture(scope="module")
def first(config_in, tmp_path_factory):
    """Return the folder of a run of a method, made once."""

    @functools.cache
    def made(method, **adapter):
        path = tmp_path_factory.mktemp("first") / method
        options = {} if method == "full" else {"r": 4, **adapter}
        return train.run(config_in(path, method=method, adapter=options, trainer={"max_steps": 2}))

    return made


@pytest.fixture(scope="module")
def stock(tiny_llama, tmp_path_factory):
    """An adapter that PEFT alone made, of no run."""
    folder = tmp_path_factory.mktemp("stock") / "adapter"
    options = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    options.task_type = "CAUSAL_LM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(tiny_llama(), options).save_pretrained(folder)
    return folder


@pytest.fixture
def further(config):
    """A run of two steps that continues an adapter."""

    def make(source, output_dir="further", **fields):
        made = config(output_dir, trainer={"max_steps": 2}, **{"adapter": {}} | fields)
        fields = {"calibration": CalibrationConfig()} | fields
        calibration = fields["calibration"]
        return dataclasses.replace(made, continue_from=str(source), calibration=calibration)

    return make


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def moved(before, after):
    """Return the kinds of matrices that differ."""
    assert before.keys() == after.keys()
    return {
        part
        for name, value in before.items()
        for part in ("lora_A", "lora_B")
        if part in name and not torch.equal(value, after[name])
    }


@pytest.fixture
def first_of_all(first, method, adapter):
    """Make the first run before calibration is blocked."""
    first(method, **adapter)


@pytest.fixture
def uncalibrated(monkeypatch):
    """Fail where something is calibrated."""

    def fail(*_, **__):
        raise AssertionError("calibrated")

    monkeypatch.setattr("tlora.adapter.attach.made_plan", fail)


@pytest.mark.usefixtures("first_of_all", "uncalibrated")
@pytest.mark.parametrize(
    ("method", "adapter", "trained"),
    [
        ("tlora", {}, {"lora_B"}),
        ("lora-fa", {}, {"lora_B"}),
        ("tlora", {"freeze_a": False}, {"lora_A", "lora_B"}),
        ("lora", {}, {"lora_A", "lora_B"}),
        ("pissa", {}, {"lora_A", "lora_B"}),
    ],
)
def test_a_run_is_trained_further_as_it_was(first, further, method, adapter, trained, caplog):
    caplog.set_level("INFO", "tlora")
    before = first(method, **adapter)
    run = train.run(further(before.path))
    assert moved(weights(before.adapter), weights(run.adapter)) == trained
    said = "B trains; A stays frozen" if trained == {"lora_B"} else "A and B train"
    assert f"Continuing {before.adapter}. {said}. No calibration is needed." in caplog.text
    config = run.config()
    frozen = trained == {"lora_B"}
    assert config["method"] == (method if frozen else "lora")
    assert config["continue_from"] == str(before.adapter)
    if frozen:
        assert config["adapter"] == before.config()["adapter"]
    own, old = (peft.LoraConfig.from_pretrained(each.adapter) for each in (run, before))
    assert (own.r, own.rank_pattern, own.alpha_pattern) == (
        old.r,
        old.rank_pattern,
        old.alpha_pattern,
    )


def test_an_adapter_of_no_run_trains_a_and_b_on_its_own_base(stock, further, llama_folder, caplog):
    caplog.set_level("INFO", "tlora")
    command = further(stock)
    run = train.run(command)
    assert f"A and B train ({stock} does not record whether A was frozen; continue" in caplog.text
    assert moved(weights(stock), weights(run.adapter)) == {"lora_A", "lora_B"}
    adapter = run.config()["adapter"]
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 6)
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    train.run(command)  # nothing is left to do
    train.run(RunConfig(output_dir=command.output_dir, resume=True))


def test_a_checkpoint_is_an_adapter_of_its_run(first, further):
    before = first("tlora")
    run = train.run(further(before.checkpoints / "checkpoint-2"))
    assert run.config()["method"] == "tlora"
    assert moved(weights(before.adapter), weights(run.adapter)) == {"lora_B"}


def test_interrupted_it_resumes_to_the_same_weights(first, further, interrupted, tmp_path):
    adapter = first("tlora").path
    fields = {"trainer": {"max_steps": 4, "save_steps": 2}}
    command = further(adapter)
    command = dataclasses.replace(command, trainer=command.trainer | fields["trainer"])
    whole = train.run(dataclasses.replace(command, output_dir=str(tmp_path / "whole")))
    folder = interrupted(command, step=3)
    train.run(command)
    assert not moved(weights(whole.adapter), weights(folder.adapter))


@pytest.mark.parametrize("resume", [True, False])
def test_an_adapter_that_changed_is_refused(stock, further, interrupted, tmp_path, resume):
    own = shutil.copytree(stock, tmp_path / "own")
    command = further(own)
    steps = {"max_steps": 4, "save_steps": 2}
    command = dataclasses.replace(command, trainer=command.trainer | steps)
    interrupted(command, step=3)
    file = own / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    again = RunConfig(output_dir=command.output_dir, resume=True) if resume else command
    with pytest.raises(ConfigError, match=f"`continue_from`, {own}, has changed since"):
        train.run(again)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapter": {"r": 8}}, "has its own options, so `adapter.r` cannot be set"),
        ({"method": "pissa"}, "trains by the method 'lora', not 'pissa'; remove --method"),
        ({"calibration": CalibrationConfig(samples=3)}, "nothing is calibrated, so `calibration`"),
        (
            {"data": DataConfig(kind="classification", text_column="a", label_column="b")},
            "the adapter is for 'CAUSAL_LM', but this task is 'SEQ_CLS'",
        ),
    ],
)
def test_what_the_adapter_settles_cannot_be_set(stock, further, fields, said):
    command = further(stock, **fields)
    with pytest.raises(ConfigError) as caught:
        train.run(command)
    assert said in str(caught.value)
    assert not Path(command.output_dir).exists()


def test_what_is_no_lora_adapter_is_refused(first, further, tmp_path, tiny_llama):
    with pytest.raises(ConfigError, match="there is no folder 'nowhere'"):
        train.run(further("nowhere"))
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        train.run(further(tmp_path))
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        train.run(further(first("full").path))
    options = peft.IA3Config(task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_llama(), options).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConfigError, match="of the type 'IA3'; only those of the type 'LORA'"):
        train.run(further(tmp_path / "ia3"))
    with pytest.raises(ConfigError, match="`tlora init` makes a new adapter; remove it"):
        InitConfig(continue_from="run")


def test_a_base_of_other_sizes_is_refused(stock, further, saved, tiny_llama):
    other = saved(tiny_llama(hidden_size=32))
    with pytest.raises(MisfitError, match="does not fit"):
        train.run(further(stock, model=other))


def test_the_printed_configuration_names_what_is_trained_and_reads_back(stock, tmp_path, capsys):
    words = ["train", "--continue_from", str(stock), "--output_dir", str(tmp_path / "run")]
    assert cli.main([*words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert (config["method"], config["adapter"]["r"]) == ("lora", 3)
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    assert cli.main(["train", str(file), "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_the_classes_stay_those_of_the_run(config, saved, tiny_bert_classifier, further, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"x {n},{'yn'[n % 2]}\n" for n in range(8)))
    data = DataConfig(kind="classification", text_column="text", label_column="label")
    fields = {"model": saved(tiny_bert_classifier()), "train_file": str(rows), "data": data}
    before = train.run(config("first", **fields))
    run = train.run(further(before.path, **fields))
    assert run.config()["data"]["label_names"] == ["n", "y"]
    assert moved(weights(before.adapter), weights(run.adapter)) == {"lora_B"}
    other = dataclasses.replace(data, label_names=["y", "n"])
    with pytest.raises(ConfigError, match=r"classes are \['n', 'y'\]; remove"):
        train.run(further(before.path, "other", **fields | {"data": other}))


def test_added_tokens_stay_those_of_the_run(config, further):
    added = TokensConfig(add=["<a>"])
    before = train.run(config("first", tokens=added, trainer={"max_steps": 2}))
    run = train.run(further(before.path))
    assert run.config()["tokens"]["add"] == ["<a>"]
    assert moved(weights(before.adapter), weights(run.adapter)) == {"lora_B"}
    with pytest.raises(ConfigError, match=r"for the added tokens \['<a>'\], and no others"):
        train.run(further(before.path, "other", tokens=TokensConfig(add=["<b>"])))


@pytest.mark.parametrize(
    ("text", "said"),
    [("[]", "not the configuration of an adapter"), ('{"peft_type": "LORA", "r": "8"}', "has `r")],
)
def test_an_adapter_whose_configuration_is_damaged_is_refused(text, said, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(TLoraError, match=said):
        with_adapter(RunConfig(continue_from=str(tmp_path)))
