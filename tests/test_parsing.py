"""What a wrong flag is told: the flag that was meant, by its whole name."""

from __future__ import annotations

import pytest

from tlora.compare.compareconfig import CompareConfig
from tlora.errors import ConfigError
from tlora.parsing import parse
from tlora.training.runconfig import RunConfig


@pytest.mark.parametrize(
    ("record", "flag", "meant"),
    [
        (RunConfig, "--lr", "--learning_rate"),
        (RunConfig, "--max_step", "--max_steps"),
        (RunConfig, "--rank", "--r"),
        (RunConfig, "--target_modules", "--adapter.target_modules"),
        (RunConfig, "--load_in_4bit", "--quantization"),
        (RunConfig, "--model_name_or_path", "--model"),
        (RunConfig, "--data.prompt", "--data.prompt_column"),
        (RunConfig, "--max_seq_length", "--data.max_length"),
        (CompareConfig, "--learning_rate", "--learning_rates"),
    ],
)
def test_what_a_flag_is_called_elsewhere_is_named(record, flag, meant):
    with pytest.raises(ConfigError) as caught:
        parse("tlora", record, [flag, "1"])
    said = f"there is no flag `{flag}`. Did you mean '{meant}'?"
    assert caught.value.faults == (said,)


def test_a_flag_of_a_section_that_is_there_is_looked_for_in_it_alone():
    with pytest.raises(ConfigError) as caught:
        parse("tlora", RunConfig, ["--data.r", "1"])
    assert "--adapter" not in str(caught.value)
