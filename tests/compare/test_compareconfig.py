import pytest
import yaml

from tlora import cli
from tlora.compare.compareconfig import CompareConfig
from tlora.errors import ConfigError
from tlora.parsing import parse
from tlora.training.runconfig import CalibrationConfig
from tlora.yamlfiles import to_yaml


def config(**fields):
    return CompareConfig(**{"methods": ["lora", "tlora"], "learning_rates": [1e-3]} | fields)


def test_an_entry_says_only_what_differs():
    made = config(
        adapter={"r": 4, "lr_ratio": 2.0},
        methods=["tlora", {"name": "loraplus", "label": "LoRA+ 16", "adapter": {"r": 16}}],
    )
    tlora, plus = made.entries()
    assert (tlora.label, tlora.adapter) == ("tlora", {"r": 4})  # it has no such option
    assert (plus.label, plus.adapter) == ("LoRA+ 16", {"r": 16, "lr_ratio": 2.0})
    assert plus.learning_rates == tlora.learning_rates == [1e-3]
    assert plus.given() == plus.adapter
    assert config(adapter={"r": 8}).entries()[0].given() == {}  # the method's own default


def test_rates_of_an_entry_replace_the_common_ones():
    entry = {"name": "lora", "learning_rates": [3e-3, 1e-4]}
    both = config(methods=[entry, "tlora"], learning_rates=[1.0, 2.0])
    assert [e.learning_rates for e in both.entries()] == [[1e-4, 3e-3], [1.0, 2.0]]
    assert config(methods=[entry], learning_rates=[]).entries()[0].learning_rates == [1e-4, 3e-3]


def test_how_a_method_calibrates_is_its_own():
    more = {"name": "tlora", "label": "64 rows", "calibration": {"samples": 64, "batch_size": 4}}
    made = config(methods=["tlora", more], calibration=CalibrationConfig(samples=16))
    first, second = made.entries()
    assert (first.calibration, second.calibration) == ({}, {"samples": 64})
    runs = [made.run_config(entry, 1e-3, 0).to_dict() for entry in (first, second)]
    assert [run["calibration"]["samples"] for run in runs] == [16, 64]
    assert {name for name in runs[0] if runs[0][name] != runs[1][name]} == {"calibration"}


def test_all_runs_differ_in_method_rate_and_seed_alone():
    made = config(trainer={"max_steps": 3}, test_file="test.jsonl", train_file="train.jsonl")
    first, second = (
        made.run_config(entry, rate, seed).to_dict()
        for entry, rate, seed in zip(made.entries(), (1e-3, 1e-4), (0, 1), strict=True)
    )
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"method", "seed", "trainer"}
    assert first["trainer"] | {"learning_rate": 1e-4} == second["trainer"]
    assert first["trainer"]["save_strategy"] == "no"
    assert first["eval_file"] == "test.jsonl"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": []}, "`methods` is empty"),
        ({"methods": ["lorra"]}, "item 1: there is no method 'lorra'. Did you mean 'lora'?"),
        ({"methods": [{"label": "x"}]}, "item 1: `name` is missing; name a method."),
        ({"methods": [3]}, "item 1: 3 is not a method; give a name"),
        (
            {"methods": [{"name": "lora", "adapter": {"rr": 3}}]},
            "item 1: `adapter`: there is no option `rr`. Did you mean 'r'?",
        ),
        (
            {"methods": [{"name": "tlora", "calibration": {"sample": 3}}]},
            "item 1: there is no field `calibration.sample`. Did you mean 'calibration.samples'?",
        ),
        (
            {"methods": [{"name": "tlora", "calibration": {"cache": "c.safetensors"}}]},
            "item 1: a comparison does not support `calibration.cache`: each run calibrates",
        ),
        (
            {"methods": [{"name": "lora", "calibration": {"samples": 64}}]},
            "item 1: `calibration` does not apply: this method does not calibrate",
        ),
        ({"methods": ["lora", "lora"]}, "two items have the label 'lora'"),
        ({"methods": ["lora", {"name": "lora", "label": "x"}]}, "'x' duplicates"),
        ({"adapter": {"rang": 3}}, "`adapter`: there is no option `rang`"),
        ({"learning_rates": []}, "`learning_rates` is []; give positive numbers"),
        ({"learning_rates": [1e-3, 0.001]}, "each once"),
        *[({"learning_rates": [bad]}, "positive numbers") for bad in (0, -1, float("nan"), True)],
        ({"final_seeds": [2**32]}, "give whole numbers from 0 to 2**32 - 1, each once."),
        (
            {"methods": ["tlora", {"name": "lora", "learning_rates": [1.0, 2.0]}]},
            "the methods have 1 and 2 learning rates; give every method the same number",
        ),
        ({"tuning_seeds": []}, "`tuning_seeds` is []"),
        ({"final_seeds": [1, 2]}, "share [1], but reported runs need seeds that did not choose"),
        ({"validation": 1.5}, "`validation` is 1.5"),
        ({"trainer": {"learning_rate": 1e-3}}, "set `learning_rates`"),
        ({"trainer": {"save_strategy": "epoch"}}, "write no checkpoints"),
        ({"trainer": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "depends on a run's scores"),
        ({"calibration": CalibrationConfig(cache="c.safetensors")}, "each run calibrates"),
        (
            {"engine": "ray", "jobs": 2},
            "`jobs` does not apply to Ray; use `cpus_per_run` and `gpus_",
        ),
        ({"cpus_per_run": 2}, "`cpus_per_run` requires `engine: ray`"),
        ({"gpus_per_run": 0.0}, "`gpus_per_run` requires `engine: ray`"),
        ({"engine": "ray", "gpus_per_run": 2}, "`gpus_per_run` is 2; give a number from 0 to 1."),
    ],
)
def test_what_is_wrong_or_would_be_unequal_is_refused(fields, message):
    with pytest.raises(ConfigError) as fault:
        config(**fields)
    assert message in str(fault.value)


def test_all_faults_come_at_once():
    with pytest.raises(ConfigError) as fault:
        config(jobs=0, learning_rates=[], methods=["lorra", {"nam": 1}])
    assert len(fault.value.faults) == 5


def test_the_file_is_the_first_word_and_flags_win(tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(
        "methods:\n  - lora\n  - {name: tlora, learning_rates: [2e-3]}\n"
        "learning_rates: [1e-3]\njobs: 2\ntrainer: {max_steps: 5}\nvalidation: 0.2\n"
    )
    made = parse("tlora compare", CompareConfig, [str(file), "--jobs", "3"]).record
    assert (made.jobs, made.validation, made.trainer) == (3, 0.2, {"max_steps": 5})
    assert [entry.learning_rates for entry in made.entries()] == [[1e-3], [2e-3]]
    named = parse("tlora compare", CompareConfig, [str(file), "--validation", "v.tsv"]).record
    assert named.validation == "v.tsv"


def test_the_resolved_comparison_reads_back_and_means_the_same(tmp_path, capsys):
    first = config(adapter={"r": 4}, methods=["tlora", "lora"])
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(first.resolved()))
    assert cli.main(["compare", str(file), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(file.read_text())
    second = parse("tlora compare", CompareConfig, [str(file)]).record
    for before, after in zip(first.entries(), second.entries(), strict=True):
        assert before.given() == after.given()
        assert before.options(seed=3) == after.options(seed=3)
