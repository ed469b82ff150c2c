"""Short names are the trainer's and the adapter's fields; the help shows them on one screen."""

import pytest
import yaml

from tlora.compare.compareconfig import CompareConfig
from tlora.evaluate.evalconfig import EvalConfig
from tlora.exporters.exportconfig import ExportConfig
from tlora.shortnames import SHORT, short_names
from tlora.training.runconfig import RunConfig
from tlora.verbconfig import InitConfig

GIVEN = {
    "learning_rate": 1e-3,
    "epochs": 2,
    "batch_size": 4,
    "max_steps": 7,
    "r": 16,
    "alpha": 32,
}
TRAINER = {
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 7,
}


def resolved(tlora, *words):
    code, out, err = tlora("train", *words, "--print_config")
    assert code == 0, err
    return yaml.safe_load(out)


def test_flags_and_files_take_them_and_the_record_has_the_full_names(tlora, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(GIVEN))
    flags = [word for name, value in GIVEN.items() for word in (f"--{name}", value)]
    for words in ([file], flags, [word.replace("_", "-") for word in map(str, flags)]):
        run = resolved(tlora, *words)
        assert run["trainer"] == TRAINER
        assert (run["adapter"]["r"], run["adapter"]["lora_alpha"]) == (16, 32)
        assert not GIVEN.keys() & run.keys()


def test_a_flag_wins_over_a_file_whichever_name_each_has(tlora, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1.0e-3\ntrainer: {max_steps: 5, bf16: false}\n")
    run = resolved(tlora, file, "--trainer.learning_rate", "2e-3", "--max_steps", "6")
    assert run["trainer"] == {"learning_rate": 2e-3, "max_steps": 6, "bf16": False}
    preset = resolved(tlora, "--preset", "paper-math", "--learning_rate", "1e-4", "--r", "64")
    assert (preset["trainer"]["learning_rate"], preset["adapter"]["r"]) == (1e-4, 64)


def test_two_values_of_one_field_are_a_fault(tlora, tmp_path):
    said = "`epochs` is 2 and `trainer.num_train_epochs` is 3, two names of one field; give one of"
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 2\ntrainer: {num_train_epochs: 3}\n")
    code, _, err = tlora("train", file)
    assert (code, f"{file}: {said}" in err) == (2, True)
    code, _, err = tlora("train", "--epochs", "2", "--trainer.num_train_epochs", "3")
    assert (code, said in err) == (2, True)
    same = resolved(tlora, "--epochs", "2", "--trainer.num_train_epochs", "2")
    assert same["trainer"] == {"num_train_epochs": 2}


def test_which_verbs_take_them(tlora):
    everything = SHORT.keys() - {"for"}
    assert short_names(RunConfig).keys() == short_names(InitConfig).keys() == everything
    assert short_names(ExportConfig) == {"for": "server"}
    # A comparison tunes the learning rate; `batch_size` of an evaluation is its own field.
    assert short_names(CompareConfig).keys() == everything - {"learning_rate"}
    assert short_names(EvalConfig) == {}
    code, _, err = tlora("compare", "--learning_rate", "1e-3")
    assert code == 2
    assert "there is no flag `--learning_rate`. Did you mean '--learning_rates'?" in err


@pytest.mark.parametrize("verb", ["train", "init", "compare"])
def test_the_help_fits_a_screen_and_names_what_people_set(tlora, verb):
    code, out, _ = tlora(verb, "--help")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    rate = "--learning_rates" if verb == "compare" else "--learning_rate "
    for flag in ("--model", "--train_file", "--output_dir", rate, "--epochs", "--r "):
        assert flag in out
    assert lines[-1] == f"`tlora {verb} --help all` shows every flag, in groups."


def test_the_whole_help_has_groups_with_examples_and_links(tlora):
    _, out, _ = tlora("train", "--help", "all")
    for words in (
        "rows and columns, for example --data.prompt_column question:",
        "options of the method, for example --adapter.target_modules q_proj,v_proj:",
        "rows that the method calibrates on, for example --calibration.samples 64:",
        "training arguments, for example --trainer.lr_scheduler_type cosine:",
        "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.Training",
        "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
        "--adapter.rank_min",
        "Short for --trainer.num_train_epochs.",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr", "--learning_rate"),
        ("--rank", "--r"),
        ("--lora_r", "--r"),
        ("--num_epochs", "--trainer.num_train_epochs"),
        ("--micro_batch_size", "--batch_size"),
        ("--base_model", "--model"),
        ("--max_seq_length", "--data.max_length"),
        ("--load_in_4bit", "--quantization"),
        ("--bf16", "--trainer.bf16"),
        ("--num_train_epochs", "--trainer.num_train_epochs"),
        ("--lora_alpha", "--adapter.lora_alpha"),
        ("--prompt_column", "--data.prompt_column"),
        # Of the same section, or none.
        ("--data.max_lenght", "--data.max_length"),
        ("--data.nosuch_size", None),
        ("--calibration.max_length", None),
        ("--adaptor.val_size", "--adapter.val_size"),
    ],
)
def test_a_flag_is_suggested_by_its_meaning(tlora, given, meant):
    code, _, err = tlora("train", given, "1")
    assert code == 2
    hint = f" Did you mean {meant!r}?" if meant else ""
    assert f"there is no flag `{given}`.{hint}\n" in err
