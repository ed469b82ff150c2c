"""No credential is kept or shown, wherever it is planted."""

import dataclasses
import json
import logging

import pytest
import yaml

from tlora import cli
from tlora.compare.compareconfig import CompareConfig
from tlora.credentials import HIDDEN, faults, is_secret_name, redacted
from tlora.errors import ConfigError, DataError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.scoring.mtbench.judgeconfig import JudgeConfig
from tlora.tasks.dataconfig import DataConfig
from tlora.training.runconfig import RunConfig

HUB = "hf_PLANTEDplantedPLANTED0123456789abc"
"""A text that has the form of a Hub token, and is none."""
PLAIN = "planted-plain-word"
"""A text that only the name of its field gives away."""


SECRET = (
    "hub_token trainer.push_to_hub_token HF_TOKEN OPENAI_API_KEY WANDB_API_KEY password token"
    " AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID client_secret"
)
ALIKE = (
    "pad_token trainer.eos_token max_tokens judge.key_variable pad_token_id secretary keys"
    " average_tokens_across_devices label_key"
)


@pytest.mark.parametrize("name", SECRET.split())
def test_names_of_credentials(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ALIKE.split())
def test_names_that_only_look_alike(name):
    assert not is_secret_name(name)


def test_of_all_training_arguments_only_the_hubs_tokens_are_credentials():
    from transformers import Seq2SeqTrainingArguments
    from trl import SFTConfig

    records = (SFTConfig, Seq2SeqTrainingArguments)
    names = {field.name for record in records for field in dataclasses.fields(record)}
    assert {name for name in names if is_secret_name(name)} <= {"hub_token", "push_to_hub_token"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"no access with {HUB}, sorry", f"no access with {HIDDEN}, sorry"),
        ("https://me:planted@host/x?a=1", f"https://{HIDDEN}@host/x?a=1"),
        ("https://host/x?token=planted&a=1#b", f"https://host/x?token={HIDDEN}&a=1#b"),
        (f"`hub_token` is '{PLAIN}'; give", f"`hub_token` is '{HIDDEN}'; give"),
        (f"Args(hub_token='{PLAIN}', n=1)", f"Args(hub_token='{HIDDEN}', n=1)"),
        (f'{{"password": "{PLAIN}"}}', f'{{"password": "{HIDDEN}"}}'),
        (f"Authorization: Bearer {PLAIN}", f"Authorization: Bearer {HIDDEN}"),
        ("the token is invalid", "the token is invalid"),
        ("`pad_token` is '<|endoftext|>'", "`pad_token` is '<|endoftext|>'"),
        ("git@github.com:a/b, 24 tokens: all", "git@github.com:a/b, 24 tokens: all"),
    ],
)
def test_messages_show_none(text, shown):
    assert redacted(text) == shown
    assert str(DataError(text)) == shown
    assert redacted(shown) == shown


def test_what_the_environment_holds_is_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", PLAIN)
    assert redacted(f"refused {PLAIN}.") == f"refused {HIDDEN}."
    (sentence,) = faults("title", f"with {PLAIN}")
    assert sentence.startswith("`title` holds a credential") and PLAIN not in sentence


RECORDS = {
    "trainer": lambda text: RunConfig(trainer={"hub_token": text}),
    "within a text": lambda text: RunConfig(trainer={"optim_args": f"lr=1,api_key={text}"}),
    "a name": lambda text: CompareConfig(trainer_defaults={"run_name": f"password: {text}"}),
    "a mapping": lambda text: RunConfig(trainer={"credentials": {"user": text}}),
    "nested": lambda text: RunConfig(trainer={"fsdp_config": {"inner": [{"api_key": text}]}}),
    "adapter": lambda text: RunConfig(adapter={"secret": text}),
    "compare": lambda text: CompareConfig(trainer_defaults={"hub_token": text}),
    "a method": lambda text: CompareConfig(methods=[{"name": "lora", "password": text}]),
    "model": lambda text: RunConfig(model=f"https://me:{text}@host/model"),
    "data": lambda text: RunConfig(data=DataConfig(dataset=f"https://host/x?token={text}")),
    "eval": lambda text: EvalConfig(models=["a", f"b=https://me:{text}@host/b"], tasks=["t"]),
    "gen_kwargs": lambda text: EvalConfig(models=["a"], tasks=["t"], gen_kwargs={"token": text}),
    "judge": lambda text: EvalConfig(judge=JudgeConfig(request={"authorization": text})),
    "judge's url": lambda text: EvalConfig(
        judge=JudgeConfig(url=f"https://host/v1?sig={text}", model="m")
    ),
    "the key for its variable": lambda text: EvalConfig(judge=JudgeConfig(key_variable=text)),
}


@pytest.mark.parametrize("place", RECORDS)
def test_a_configuration_with_one_is_refused_without_showing_it(place):
    with pytest.raises(ConfigError) as error:
        RECORDS[place](PLAIN)
    assert PLAIN not in str(error.value)
    assert any("(not shown here" in fault for fault in error.value.faults)


def test_a_number_is_one_and_a_name_that_looks_alike_is_none():
    with pytest.raises(ConfigError, match=r"`trainer.password` holds a credential"):
        RunConfig(trainer={"password": 12345678})
    RunConfig(model="sk-learn-for-transformers", output_dir="hf_transformersmodels")
    RunConfig(trainer={"hub_token": None, "eos_token": "<|end_of_text|>"}, model="hf://a/b@main")


@pytest.mark.parametrize("key", ["sk-", "sk-proj-", "sk-ant-api03-", "sk-or-v1-"])
def test_keys_of_services_are_told_from_names_with_a_language_code(key):
    planted = f"{key}4planted5PLANTED6planted"
    assert redacted(f"refused {planted}.") == f"refused {HIDDEN}."
    with pytest.raises(ConfigError, match="`model` holds a credential"):
        RunConfig(model=planted)
    name = "org/opus-mt-sk-en-finetuned-v2-large"
    assert RunConfig(model=name).model == redacted(name) == name


def test_a_mapping_that_holds_itself_is_searched_once():
    value = {"token": PLAIN}
    value["again"] = [value]
    assert len([*faults("trainer", value)]) == 1


def test_the_sentence_says_where_credentials_belong():
    with pytest.raises(ConfigError, match=r"`trainer.hub_token` holds .* run `hf auth login`"):
        RunConfig(trainer={"hub_token": PLAIN})
    with pytest.raises(ConfigError, match=r"variable that `judge.key_variable` names"):
        EvalConfig(judge=JudgeConfig(request={"api_key": PLAIN}))


def everything(folder):
    """Return the name and content of every file below a folder, as one text of bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(str(path).encode() + path.read_bytes() for path in files)


PLANTED = [f"planted{i}Planted{i}" for i in range(10)]


def test_planted_in_flags_and_files_nothing_runs_and_nothing_is_written(tmp_path, capsys):
    """With --print_config too."""
    p = iter(PLANTED)
    values = {"trainer": {"hub_token": next(p)}, "data": {"dataset": f"https://u:{next(p)}@h/d"}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    run = tmp_path / "out"
    given = [("train", str(file)), ("train", str(file), "--print_config")]
    flags = [
        ("train", "--trainer.hub_token", next(p)),
        ("train", f"--trainer.push_to_hub_token={next(p)}"),
        ("init", "--model", f"https://u:{next(p)}@h/m"),
        ("train", f"--hub_token={next(p)}"),
        ("compare", "--adapter.api_key", next(p)),
        ("eval", "m", "--tasks", "t", "--judge.url", f"https://h/v1?key={next(p)}"),
        ("eval", "m", "--gen_kwargs", f"token={next(p)}"),
        ("eval", "m", "--judge.request", json.dumps({"api_key": next(p)})),
    ]
    given += flags + [(*words, "--print_config") for words in flags]
    for words in given:
        assert cli.main([*words, "--output_dir", str(run)]) == 2, words
    said = capsys.readouterr()
    assert not run.exists()
    for secret in PLANTED:
        assert secret not in said.out + said.err


def test_planted_in_the_environment_a_run_writes_and_shows_none(
    config, tmp_path, monkeypatch, capfd
):
    names = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "GH_TOKEN"]
    names += ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DB_PASSWORD", "MY_SECRET", "API_KEY"]
    for name, secret in zip(names, PLANTED, strict=True):
        monkeypatch.setenv(name, secret)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config().to_dict()))
    assert cli.main(["train", str(file)]) == 0
    said = capfd.readouterr()
    found = everything(tmp_path) + said.out.encode() + said.err.encode()
    assert b"adapter_model.safetensors" in found
    for secret in PLANTED:
        assert secret.encode() not in found


def test_an_unforeseen_error_and_a_log_show_none(monkeypatch, capsys, tmp_path):
    def fails(config):
        logging.getLogger("another.library").warning("sent %s", HUB)
        raise RuntimeError(f"refused: {HUB}")

    verb = dataclasses.replace(cli.VERBS["list"], run=fails)
    monkeypatch.setitem(cli.VERBS, "list", verb)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert cli.main(["list"]) == 1
    said = capsys.readouterr().err
    assert f"sent {HIDDEN}" in said and f"RuntimeError: refused: {HIDDEN}" in said
    assert HUB not in said
