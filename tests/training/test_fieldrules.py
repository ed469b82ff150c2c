"""Values of the trainer's fields that cannot train: found before the model is loaded."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest

from tlora import cli
from tlora.checks import takes
from tlora.errors import ConfigError, DataError
from tlora.models.pretrained import load_class
from tlora.tasks.dataconfig import DataConfig
from tlora.training import dryrun, initialize, setup, train
from tlora.training.fieldrules import RULES
from tlora.training.kinds import KINDS, check_trainer_fields
from tlora.training.setup import Setup, settle

COUNT = "give a whole number, 1 or more."
NOT_NEGATIVE = "give a number, 0 or more."
POSITIVE = "give a positive number."
SHARE = "give a probability in [0, 1)."
STEPS = "give a whole number of steps, or a share of all steps below 1."
NAN = float("nan")

WRONG: list[tuple[str, Any, str]] = [
    *[
        ("learning_rate", bad, "give a positive number; at 0 nothing trains")
        for bad in (-1, 0, 0.0, NAN, True, "fast")
    ],
    *[("num_train_epochs", bad, POSITIVE) for bad in (-1, 0, NAN)],
    *[
        ("max_steps", bad, "give a positive whole number of steps, or -1 to train by epochs.")
        for bad in (0, -2, 1.5)
    ],
    *[(f"per_device_{part}_batch_size", 0, COUNT) for part in ("train", "eval")],
    ("per_device_train_batch_size", -8, COUNT),
    ("gradient_accumulation_steps", 0, COUNT),
    ("dataloader_num_workers", -1, "give a whole number, 0 or more."),
    ("weight_decay", -0.1, NOT_NEGATIVE),
    ("warmup_steps", -1, NOT_NEGATIVE),
    ("max_grad_norm", -1, NOT_NEGATIVE),
    *[(name, bad, STEPS) for name in ("logging_steps", "save_steps") for bad in (0, -1, 1.5)],
    ("adam_beta1", 1.0, SHARE),
    ("adam_beta2", -0.1, SHARE),
    ("adam_epsilon", 0, POSITIVE),
    ("label_smoothing_factor", -1, SHARE),
    ("data_seed", 2**32, "give a whole number from 0 to 2**32 - 1."),
    ("train_sampling_strategy", "sequentail", "Did you mean 'sequential'?"),
    ("loss_type", "ce", "choose one of 'nll', 'dft'"),
    ("dataloader_persistent_workers", True, "give `dataloader_num_workers` too."),
    ("parallelism_config", {"tp_size": 2}, "set it by `accelerate launch`."),
    ("push_to_hub", True, "`push_to_hub` needs `hub_model_id`"),
    ("label_names", 3, "give a list of names."),
]

REFUSED_LATER: list[tuple[dict[str, Any], str]] = [
    ({"report_to": "wandbb"}, "`report_to` names 'wandbb'; choose from"),
    ({"push_to_hub": True, "hub_model_id": "a/b"}, "HF_HUB_OFFLINE is set"),
    ({"torch_compile_backend": "inducto"}, "Did you mean 'inductor'?"),
    ({"torch_compile_mode": "defaut"}, "Did you mean 'default'?"),
    ({"log_level": "loud"}, "`log_level` is 'loud'; choose one of"),
    ({"optim_args": "foo"}, "`optim` 'adamw_torch_fused' with `optim_args` 'foo' cannot be used"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_type` 'cosine_with_min_lr'"),
    ({"lr_scheduler_kwargs": {"foo": 1}}, "unexpected keyword argument 'foo'"),
    (
        {"gradient_checkpointing_kwargs": {"foo": 1}},
        "`gradient_checkpointing_kwargs` cannot be used",
    ),
]


@pytest.mark.parametrize(("name", "value", "advice"), WRONG, ids=str)
def test_a_value_that_cannot_train_is_one_sentence(name, value, advice):
    with pytest.raises(ConfigError) as caught:
        check_trainer_fields(KINDS["causal"], {name: value})
    (fault,) = caught.value.faults
    assert fault.startswith(f"`{name}` ")
    assert advice in fault


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_s_own_defaults_pass(kind):
    arguments = load_class(KINDS[kind].arguments)
    fields = {field.name: field for field in dataclasses.fields(arguments)}
    for name in RULES.keys() & fields.keys():
        assert takes(RULES[name], fields[name].default), name


def test_every_rule_is_of_a_field_that_there_is():
    fields = {
        field.name: field
        for kind in KINDS.values()
        for field in dataclasses.fields(load_class(kind.arguments))
    }
    assert RULES.keys() <= fields.keys()
    for name, rule in RULES.items():
        if takes(rule, None):
            assert type(None) in typing.get_args(fields[name].type), name


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": -1, "num_train_epochs": 0.5, "warmup_steps": 0.1, "save_steps": 0.25},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"label_names": "labels", "optim_target_modules": "q_proj"},
        {"eval_steps": None, "save_total_limit": None, "max_grad_norm": 0},
    ],
    ids=str,
)
def test_values_that_train_pass(fields):
    check_trainer_fields(KINDS["causal"], fields)


def test_all_faults_come_at_once():
    fields = {"learning_rate": -1, "max_steps": 0, "adam_beta1": 2, "wam_up": 3}
    with pytest.raises(ConfigError) as caught:
        check_trainer_fields(KINDS["causal"], fields)
    assert len(caught.value.faults) == 4


def nothing_read(*_):
    raise AssertionError("a row or the model was read")


@pytest.mark.parametrize("verb", [train, initialize])
@pytest.mark.parametrize(("fields", "sentence"), REFUSED_LATER, ids=str)
def test_what_is_missing_is_found_before_anything_is_read(
    config, monkeypatch, verb, fields, sentence
):
    monkeypatch.setattr(setup, "load_tokenizer", nothing_read)
    monkeypatch.setattr(Setup, "load_model", nothing_read)
    run = config(trainer=fields)
    with pytest.raises(ConfigError) as caught:
        verb.run(run)
    assert sentence in str(caught.value)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("absent", ["wandb", "tensorboard"])
def test_a_service_whose_package_is_missing(config, monkeypatch, absent):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, f"is_{absent}_available", lambda: False)
    with pytest.raises(ConfigError, match=f"`report_to` names '{absent}', which is not installed"):
        train.run(config(trainer={"report_to": [absent]}))


def test_an_optimizer_whose_package_is_missing(config, monkeypatch):
    from transformers import trainer_optimizer

    monkeypatch.setattr(trainer_optimizer, "is_galore_torch_available", lambda: False)
    with pytest.raises(ConfigError, match=r"`optim` 'galore_adamw' cannot be used.*galore_torch"):
        train.run(config(trainer={"optim": "galore_adamw"}))


def test_an_evaluation_at_the_start_needs_rows(config, monkeypatch):
    monkeypatch.setattr(Setup, "load_model", nothing_read)
    with pytest.raises(ConfigError, match="`eval_on_start` is True, but there are no evaluation"):
        train.run(config(trainer={"eval_on_start": True}))


def test_offloading_needs_somewhere_to_load_from(config, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ConfigError, match="`activation_offloading` needs an accelerator"):
        train.run(config(trainer={"activation_offloading": True}))


def test_pushing_needs_a_token(config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="`push_to_hub` needs a Hub token"):
        train.run(config(trainer={"push_to_hub": True, "hub_model_id": "a/b"}))


def test_what_the_trainer_refuses_for_this_model_is_a_sentence(config):
    with pytest.raises(ConfigError, match="not a Mixture-of-Experts model"):
        train.run(config(trainer={"router_aux_loss_coef": 0.1}))


def test_one_word_is_one_name_in_the_trainer_s_lists(config, tmp_path):
    from tlora.training.arguments import training_arguments

    setup = settle(config(trainer={"label_names": "labels", "optim_target_modules": "q_proj"}))
    arguments = training_arguments(setup, tmp_path)
    assert arguments.label_names == ["labels"]
    assert arguments.optim_target_modules == "q_proj"


def test_an_adapter_on_the_output_layer_is_refused_where_the_trainer_bypasses_it(config):
    run = config(adapter={"r": 2, "target_modules": ["lm_head", "q_proj"]})
    with pytest.raises(ConfigError, match="chooses 'lm_head', the output layer"):
        train.run(run)
    assert initialize.run(run).finished


def test_a_task_type_of_another_task_is_refused(config):
    run = config(method="lora", adapter={"r": 2, "task_type": "TOKEN_CLS"})
    message = r"adapter: `task_type` is 'TOKEN_CLS', but this task is 'CAUSAL_LM'; remove it\."
    for verb in (train, initialize, dryrun):
        with pytest.raises(ConfigError, match=message):
            verb.run(run)


@pytest.mark.parametrize("names", [None, ["no", "yes"]])
def test_a_classification_needs_rows_of_two_classes(config, tmp_path, names):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"t": "so {n}", "l": "yes"}}\n' for n in range(4)))
    columns = {"text_column": "t", "label_column": "l", "label_names": names}
    run = config(train_file=str(file), data=DataConfig(kind="classification", **columns))
    for verb in (train, initialize):
        with pytest.raises(DataError, match="all 4 training rows have the label 'yes'; give rows"):
            verb.run(run)


@pytest.mark.parametrize("seed", ["-1", str(2**32), "true"])
@pytest.mark.parametrize("verb", ["demo", "train", "init", "eval"])
def test_a_seed_that_numpy_does_not_take_is_refused_by_every_verb(verb, seed, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([verb, "--output_dir", str(out), "--seed", seed]) == 2
    assert "`seed` is" in capsys.readouterr().err
    assert not out.exists()


def test_the_corrected_command_starts_in_the_same_folder(llama_folder, sums, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--model", llama_folder, "--train_file", sums, "--output_dir", str(out)]
    command += ["--trainer.max_steps", "1", "--trainer.save_strategy", "no"]
    command += ["--trainer.use_cpu", "true", "--calibration.samples", "2", "--adapter.r", "2"]
    wrong = [
        ["--trainer.learning_rate", "-1"],
        ["--trainer.per_device_train_batch_size", "0"],
        ["--trainer.report_to", "nosuch"],
        ["--adapter.modules_to_save", "nosuch"],
        ["--adapter.layers_to_transform", "0"],
        ["--adapter.task_type", "SEQ_CLS"],
        ["--adapter.lora_alpha", "true"],
        ["--adapter.rank_max", "true"],
        ["--trainer.num_train_epochs", "-1"],
        ["--seed", str(2**32)],
        ["--adapter.seed", str(2**70)],
    ]
    for flags in wrong:
        assert cli.main([*command, *flags]) == 2, flags
        assert f"`{flags[0][2:].rpartition('.')[2]}`" in capsys.readouterr().err
        assert not out.exists()
    assert cli.main(command) == 0


def test_a_start_that_fails_for_another_reason_leaves_the_folder_free(config, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    run = config()
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.training_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train.run(run)
    assert not train.RunFolder(run.output_dir).path.exists()
    assert train.run(dataclasses.replace(run, seed=3)).finished


def test_a_run_that_fails_under_way_stays_and_can_be_resumed(config, monkeypatch):
    def fail(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("no power")

    run = config()
    with monkeypatch.context() as patch:
        patch.setattr("tlora.training.trainers.LogCallback.on_step_end", fail, raising=False)
        with pytest.raises(RuntimeError, match="no power"):
            train.run(run)
    assert train.run(dataclasses.replace(run, resume=True)).finished


def test_fp16_without_a_gpu_is_refused(config):
    with pytest.raises(ConfigError, match="`fp16` needs a GPU, and this run trains on the CPU"):
        train.run(config(trainer={"fp16": True}))
