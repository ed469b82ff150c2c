"""The DeepSpeed files under examples/ leave to the run what is the run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig

FOLDER = Path(__file__).parents[2] / "examples" / "deepspeed"
STAGES = {"ds_config_zero2_no_offload.json": 2, "ds_config_zero3_no_offload.json": 3}
OF_THE_RUN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)


def test_every_file_is_known_here():
    assert {file.name for file in FOLDER.iterdir()} == {*STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_a_file_says_how_the_weights_are_shared_out_and_nothing_of_the_training(name):
    config = HfDeepSpeedConfig(str(FOLDER / name))
    assert config.get_value("zero_optimization.stage") == STAGES[name]
    assert (config.is_zero2(), config.is_zero3()) == (STAGES[name] == 2, STAGES[name] == 3)
    assert not config.is_offload()
    # transformers fills these from the training arguments; another value could contradict them.
    assert {config.get_value(field) for field in OF_THE_RUN} == {"auto"}
    # The optimizer and the schedule are the trainer's: a plan's own optimizer among them.
    assert not {"optimizer", "scheduler"} & json.loads((FOLDER / name).read_text()).keys()
