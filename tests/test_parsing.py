"""What a wrong flag is told: the flag that was meant, by its whole name."""

from __future__ import annotations

import pytest

from tlora import TLoraConfig
from tlora.compare.compareconfig import CompareConfig
from tlora.errors import ConfigError
from tlora.parsing import parse
from tlora.training.runconfig import RunConfig
from tlora.verbconfig import InspectConfig


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
        (RunConfig, "--data.val_siz", "--data.val_size"),
        (RunConfig, "--data.validation_size", "--data.val_size"),
        (RunConfig, "--target_module", "--adapter.target_modules"),
    ],
)
def test_what_a_flag_is_called_elsewhere_is_named(record, flag, meant):
    with pytest.raises(ConfigError) as caught:
        parse("tlora", record, [flag, "1"])
    said = f"there is no flag `{flag}`. Did you mean '{meant}'?"
    assert caught.value.faults == (said,)


HABITS = {
    "num_train_epochs": "trainer.num_train_epochs",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "warmup_ratio": "trainer.warmup_steps",
    "lr": "learning_rate",
    "lr_scheduler": "trainer.lr_scheduler_type",
    "optimizer": "trainer.optim",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target_modules": "adapter.target_modules",
    "lora_target": "adapter.target_modules",
    "dataset": "data.dataset",
    "datasets": "data.dataset",
    "dataset_name": "data.dataset",
    "val_set_size": "data.val_size",
    "val_siz": "data.val_size",
    "max_samples": "data.max_train_rows",
    "model_name_or_path": "model",
    "adapter_name_or_path": "continue_from",
    "quantization_bit": "quantization",
    "use_dora": "method",
    "bf16": "trainer.bf16",
}
"""Names of unsloth, Axolotl, LLaMA-Factory and transformers, and ours."""


@pytest.mark.parametrize(("habit", "meant"), HABITS.items())
def test_habits_of_other_tools_are_answered_in_flags_and_in_files(habit, meant, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{habit}: 1\n")
    for words, said in (
        ([f"--{habit}", "1"], f"there is no flag `--{habit}`. Did you mean '--{meant}'?"),
        ([str(file)], f"{file}: there is no field `{habit}`. Did you mean '{meant}'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse("tlora", RunConfig, words)
        assert caught.value.faults == (said,)


def test_a_misspelled_section_of_a_file_is_answered_by_the_section(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("trainr: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"no field `trainr`\. Did you mean 'trainer'"):
        parse("tlora", RunConfig, [str(file)])


def test_names_of_modules_with_commas_are_so_many_modules():
    words = ["--adapter.target_modules", "q_proj,v_proj"]
    given = parse("tlora", RunConfig, words).record.adapter["target_modules"]
    assert TLoraConfig(target_modules=given).target_modules == ["q_proj", "v_proj"]


def test_a_flag_of_a_section_that_is_there_is_looked_for_in_it_alone():
    with pytest.raises(ConfigError) as caught:
        parse("tlora", RunConfig, ["--data.r", "1"])
    assert "--adapter" not in str(caught.value)


def test_words_without_a_flag_fill_the_places_in_order():
    one, other = (parse("tlora", InspectConfig, words).record for words in (["a"], ["a", "b"]))
    assert (one.path, one.against) == ("a", None)
    assert (other.path, other.against) == ("a", "b")
    assert parse("tlora", InspectConfig, ["a", "--against", "b"]).record == other
    with pytest.raises(ConfigError, match="unexpected word 'c'"):
        parse("tlora", InspectConfig, ["a", "b", "c"])
