import dataclasses
import json

import pytest

from tlora.config import TLoraConfig
from tlora.errors import ConfigError
from tlora.flags import field_docs
from tlora.tasks.dataconfig import DataConfig
from tlora.training.runconfig import CalibrationConfig, RunConfig


def test_a_run_survives_json():
    run = RunConfig(
        model="m",
        adapter={"r": 4, "target_modules": ["q_proj"]},
        data=DataConfig(label_names=["no", "yes"], max_length=64),
        calibration=CalibrationConfig(samples=7),
    )
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        RunConfig(
            seed=-1,
            dtype="int8",
            train_file="a.jsonl",
            data=DataConfig(dataset="b", max_length=0, loss_on="some"),
            calibration=CalibrationConfig(samples=0),
        )
    named = [fault.split("`")[1] for fault in caught.value.faults]
    assert named == [
        "dtype",
        "data.loss_on",
        "data.max_length",
        "calibration.samples",
        "seed",
        "train_file",
    ]


def test_resolving_writes_out_the_methods_defaults():
    resolved = RunConfig(method="tlora", seed=3, adapter={"r": 4}).resolved()
    assert resolved.adapter == TLoraConfig(r=4, seed=3).to_dict()
    assert resolved.resolved() == resolved


@pytest.mark.parametrize("record", [RunConfig, DataConfig, CalibrationConfig, TLoraConfig])
def test_every_field_that_is_a_flag_says_what_it_is(record):
    docs = field_docs(record)
    for field in dataclasses.fields(record):
        if field.name not in ("data", "calibration", "tokens"):
            assert docs[field.name].endswith((".", ")."))
            assert "\n" not in docs[field.name]
