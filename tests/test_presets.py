"""Presets are settings and runs, laid below files and flags; one is the default."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from pathlib import Path

import pytest
import yaml

from tlora import cli, presets
from tlora.compare.compareconfig import CompareConfig
from tlora.config import TLoraConfig
from tlora.errors import ConfigError
from tlora.parsing import parse
from tlora.registry import METHODS, TASKS
from tlora.training import model_card
from tlora.training.kinds import KINDS, check_trainer_fields
from tlora.training.resume import merge_saved
from tlora.training.runconfig import RunConfig
from tlora.verbconfig import InitConfig
from tlora.yamlfiles import to_yaml

NAMES = [entry.name for entry in presets.entries()]
SETTINGS = ("paper-rule", "recommended", "recommended-train-a")
EQUAL = {"allocate_rank": False, "allocate_scale": False}
RUN = ("--model", "m", "--train_file", "rows.jsonl")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAPER = {
    # task: r = alpha, learning rate, schedule, warm-up share, global batch, rows
    "paper-math": ("math", 128, 2e-5, "cosine", 0.03, 128, 100_000),
    "paper-code": ("code", 128, 2e-5, "cosine", 0.03, 128, 100_000),
    "paper-chat": ("chat", 128, 2e-5, "cosine", 0.03, 128, 100_000),
    "paper-commonsense": ("commonsense", 32, 1e-4, "linear", None, 32, None),
}


def resolved(*words: str) -> RunConfig:
    return parse("tlora train", RunConfig, list(words)).record.resolved()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_are_the_papers(name):
    run = resolved("--preset", name)
    task, rank, rate, schedule, warmup, batch, rows = PAPER[name]
    assert (run.model, run.task, run.method) == ("meta-llama/Llama-2-7b-hf", task, "tlora")
    assert run.dtype == "bfloat16"
    options = TLoraConfig(**run.adapter)
    assert (options.r, options.lora_alpha) == (rank, rank)
    assert options.target_modules == PROJECTIONS
    # What the paper's method is: both allocations, calibrated and frozen A, the released scales.
    defaults = TLoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
    assert options == defaults
    trainer = run.trainer
    assert trainer["learning_rate"] == rate
    assert trainer["lr_scheduler_type"] == schedule
    assert trainer.get("warmup_steps") == warmup
    per_step = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    assert per_step == batch
    assert trainer["num_train_epochs"] == 1
    assert trainer["optim"].startswith("adamw")
    assert (run.data.max_length, run.data.loss_on) == (512, "response")
    assert run.data.max_train_rows == rows


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SETTINGS])
def test_every_other_preset_is_a_run_that_the_trainer_takes(name):
    run = resolved(f"--preset={name}")
    task = TASKS.load(run.task)(run.data)
    check_trainer_fields(KINDS[task.kind], run.trainer)
    assert task.hub is not None


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_opens_with_what_it_is_and_its_command(name):
    lines = Path(presets.path(name)).read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("# ")]
    assert lines[0].startswith("# ")
    assert any(f"tlora train --preset {name}" in line for line in head)
    assert all(len(line) <= 100 for line in lines)


def test_flags_win_over_files_and_files_over_presets(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"adapter": {"r": 16, "lora_alpha": 16}, "seed": 3}))
    words = ["--adapter.r", "4", "--config", str(file), "--preset", "paper-math"]
    run = resolved(*words)
    assert (run.adapter["r"], run.adapter["lora_alpha"], run.seed) == (4, 16, 3)
    assert run.trainer["learning_rate"] == 2e-5
    assert run.adapter["target_modules"] == PROJECTIONS
    assert run == resolved(*words[4:], *words[:4])  # wherever it stands


def test_an_unknown_preset_is_met_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"'paper-mth'\. Did you mean 'paper-math'\?"):
        resolved("--preset", "paper-mth")
    with pytest.raises(ConfigError, match="tlora list presets"):
        presets.path("zzz")
    with pytest.raises(ConfigError, match="--preset needs a value"):
        resolved("--preset")


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_takes_a_preset_and_of_its_options_those_that_it_has(method):
    run = resolved("--preset", "paper-math", "--method", method)
    preset = yaml.safe_load(Path(presets.path("paper-math")).read_text())["adapter"]
    assert run.method == method
    assert {name: run.adapter.get(name, value) for name, value in preset.items()} == preset


def test_an_option_that_the_user_gives_is_not_left_out(tmp_path):
    words = ["--preset", "paper-math", "--method", "full"]
    with pytest.raises(ConfigError, match="option `r`"):
        resolved(*words, "--adapter.r", "4")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"adapter": {"lora_alpha": 16}}))
    with pytest.raises(ConfigError, match="option `lora_alpha`"):
        resolved(*words, "--config", str(file))


def options(*words: str, record: type[RunConfig] = RunConfig) -> TLoraConfig:
    """Return the options of a run of tlora."""
    found = parse("tlora train", record, list(words)).record.options()
    assert isinstance(found, TLoraConfig)
    return found


def test_the_recommended_setting_is_equal_ranks_and_scales_and_the_class_stays_the_papers():
    assert TLoraConfig.recommended() == TLoraConfig(**EQUAL)
    assert TLoraConfig().allocate_rank
    assert TLoraConfig().allocate_scale
    assert TLoraConfig.recommended(r=16, allocate_scale=True) == TLoraConfig(
        r=16, allocate_rank=False
    )
    with pytest.raises(ConfigError, match="Did you mean 'rank_max'"):
        TLoraConfig.recommended(rank_maxx=3)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("recommended", TLoraConfig.recommended()),
        ("recommended-train-a", TLoraConfig.recommended(freeze_a=False)),
        ("paper-rule", TLoraConfig()),
    ],
)
def test_a_setting_is_the_one_of_the_class_and_sets_nothing_else(name, same):
    assert options("--preset", name) == same
    assert resolved("--preset", name) == dataclasses.replace(
        RunConfig(), adapter=dataclasses.asdict(same)
    )
    assert options("--preset", name, "--r", "4") == dataclasses.replace(same, r=4)


@pytest.mark.parametrize("record", [RunConfig, InitConfig])
def test_a_run_without_a_preset_has_the_recommended_setting(record):
    assert options(*RUN, record=record) == TLoraConfig.recommended()
    assert options(*RUN, "--method", "tlora", record=record) == TLoraConfig.recommended()


def test_flags_and_files_win_over_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("adapter: {allocate_rank: true, r: 4}\n")
    given = ("--adapter.allocate_scale", "true", "--adapter.basis", "random")
    assert options(*given) == TLoraConfig(allocate_rank=False, basis="random")
    assert options(str(file)) == TLoraConfig(allocate_scale=False, r=4)
    assert options(str(file), *given) == TLoraConfig(basis="random", r=4)
    assert options(str(file), "--adapter.allocate_rank", "false") == TLoraConfig(**EQUAL, r=4)
    file.write_text("method: lora\n")
    assert resolved(str(file)).adapter.keys().isdisjoint(EQUAL)
    assert options(str(file), "--method", "tlora") == TLoraConfig.recommended()


@pytest.mark.parametrize("method", [name for name in METHODS.names() if name != "tlora"])
def test_the_default_is_for_tlora_alone(method):
    parsed = parse("tlora train", RunConfig, [*RUN, "--method", method])
    assert (parsed.record.adapter, parsed.note) == ({}, "")


def test_the_settings_of_a_run_that_exists_are_its_own(tmp_path):
    """Resumed, continued, or written out and read again."""
    paper = RunConfig(model="m", adapter={"r": 4}).resolved()
    for words in (["--resume"], ["--config", str(tmp_path / "resume.yaml")]):
        (tmp_path / "resume.yaml").write_text("resume: true\n")
        again = parse("tlora train", RunConfig, words)
        assert (again.record.adapter, again.note) == ({}, "")
        assert merge_saved(again.record, paper).adapter == paper.adapter
    further = parse("tlora train", RunConfig, [*RUN, "--continue_from", "run"])
    assert (further.record.adapter, further.note) == ({}, "")
    (tmp_path / "saved.yaml").write_text(to_yaml(paper))
    saved = parse("tlora train", RunConfig, [str(tmp_path / "saved.yaml")])
    assert (saved.record.resolved(), saved.note) == (paper, "")


def test_the_same_command_again_is_the_same_run():
    first = parse("tlora train", RunConfig, [*RUN]).record
    saved = first.resolved()
    assert merge_saved(parse("tlora train", RunConfig, [*RUN]).record, saved) == saved
    with pytest.raises(ConfigError, match=r"`adapter.allocate_rank` is True, but tlora-run was st"):
        merge_saved(parse("tlora train", RunConfig, [*RUN, "--preset", "paper-rule"]).record, saved)


@pytest.mark.parametrize("verb", ["train", "init"])
def test_the_default_is_said_in_one_line_and_only_where_it_is_used(verb, monkeypatch, caplog):
    changed = dataclasses.replace(cli.VERBS[verb], run=lambda config: None, extra=None)
    monkeypatch.setitem(cli.VERBS, verb, changed)

    def said(*words):
        caplog.clear()
        with caplog.at_level(logging.INFO, "tlora"):
            assert cli.main([verb, *RUN, *words]) == 0
        return [record.getMessage() for record in caplog.records]

    both = ["--adapter.allocate_rank", "true", "--adapter.allocate_scale", "true"]
    start = "Preset: recommended (every layer gets the same "
    end = "). For the paper's setting, give --preset paper-rule."
    assert said() == [f"{start}rank and scale{end}"]
    assert said(*both[:2]) == [f"{start}scale{end}"]
    for words in (
        ["--preset", "recommended"],
        ["--preset", "paper-rule"],
        ["--method", "lora"],
        ["--print_config"],
        both,
    ):
        assert said(*words) == []


def test_in_a_comparison_tlora_without_options_stays_the_papers():
    words = ["--methods", "tlora", "--learning_rates", "1e-3", *RUN]
    parsed = parse("tlora compare", CompareConfig, words)
    (entry,) = parsed.record.entries()
    assert entry.options() == TLoraConfig()
    assert parsed.note == ""


@pytest.mark.parametrize("words", [[], ["--preset", "paper-rule"], ["--adapter.basis", "random"]])
def test_the_command_on_a_card_is_the_same_run_whatever_the_default(words):
    run = parse("tlora train", RunConfig, [*RUN, *words]).record
    python = RunConfig(model="m", adapter={"r": 4})
    for config in (run, python):
        command = shlex.split(model_card.command(config))[2:]
        again = parse("tlora train", RunConfig, command).record.options()
        assert again == config.options()
    assert "--adapter.allocate_rank true" in model_card.command(python)
    bare = parse("tlora train", RunConfig, [*RUN]).record
    assert (
        model_card.command(bare) == "tlora train --model m --train_file rows.jsonl --output_dir run"
    )


def test_the_whole_help_has_the_defaults_of_a_run_without_a_preset(capsys):
    assert cli.main(["train", "--help", "all"]) == 0
    text = capsys.readouterr().out
    assert "Allocate ranks by sensitivity; false: every module gets r.\n" in text
    assert "By default the method's preset `recommended`, if it has one" in " ".join(text.split())
