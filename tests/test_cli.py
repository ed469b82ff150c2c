import errno
import io
import json
import re
import subprocess
import sys
import warnings

import pytest
import yaml

from tlora import cli, presets
from tlora.errors import (
    AdapterError,
    CalibrationError,
    ConfigError,
    DataError,
    OutOfMemoryError,
    SandboxError,
)
from tlora.registry import METHODS


@pytest.fixture
def resolved(tlora):
    """Return what a command line resolves to."""

    def run(*argv):
        code, out, err = tlora("train", *argv, "--print_config")
        assert code == 0, err
        return yaml.safe_load(out)

    return run


@pytest.fixture
def run_yaml(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


SLOW = ("torch", "transformers", "datasets", "peft", "trl", "matplotlib", "rich", "sklearn", "yaml")


def test_the_rank_that_a_launcher_puts_before_the_verb_is_passed_over(tlora):
    assert tlora("--local_rank=0", "list", "presets") == tlora("list", "presets")


@pytest.mark.parametrize("argv", [["train", "--help"], ["list", "tasks"]])
def test_help_and_lists_import_nothing_heavy(argv):
    code = (
        "import sys; from tlora.cli import main; code = main(sys.argv[1:]);"
        f"print([name for name in {SLOW!r} if name in sys.modules], file=sys.stderr);"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr.strip() == "[]"


def test_the_overview_names_every_verb(tlora):
    code, out, _ = tlora("--help")
    assert code == 0
    for verb in cli.VERBS.values():
        assert verb.name in out
        assert verb.summary in out
    assert tlora()[1] == out


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version(tlora, flag):
    from importlib.metadata import version

    assert tlora(flag) == (0, f"tlora {version('tlora')}\n", "")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_for_every_flag(tlora, verb):
    import dataclasses

    from tlora.flags import field_docs

    code, out, _ = tlora(verb, "--help", "all")
    assert code == 0
    record = cli.VERBS[verb].record
    summary = " ".join(out.split("\n\n")[1].split())
    assert summary.endswith(".")
    assert summary == " ".join(record.__doc__.split("\n\n")[0].split())
    for field in dataclasses.fields(record):
        assert field.name in out
    plain = {field.name for field in dataclasses.fields(record)} - {
        "data",
        "calibration",
        "judge",
        "tokens",
    }
    assert plain == field_docs(record).keys()


def test_the_help_lists_the_options_of_the_method_that_is_named(tlora):
    assert "--adapter.whiten" in tlora("train", "--help", "all")[1]
    lora = tlora("train", "--method", "lora-ga", "--help", "all")[1]
    assert "--adapter.whiten" not in lora
    assert "--adapter.stable_gamma" in lora


@pytest.mark.parametrize("more", [[], ["all"]])
@pytest.mark.parametrize(
    ("method", "r", "alpha"),
    [(None, "8", "8"), ("xgblora", "1", "1"), ("lora-one", "8", "16"), ("full", None, None)],
)
def test_the_help_shows_the_method_s_own_defaults_beside_short_flags(tlora, method, r, alpha, more):
    named = ["--method", method] if method else []
    shown = " ".join(tlora("train", *named, "--help", *more)[1].split())
    assert ("--r " in shown) == ("--alpha " in shown) == (r is not None)
    if r:
        assert f"Rank of the adapter (default: {r})." in shown
        divisor = "sqrt(r)" if method == "lora-one" else "r"
        assert f"scaled by alpha / {divisor} (default: {alpha})." in shown
    rates = METHODS.load(method or "tlora").traits.learning_rates
    assert not {"r", "lora_alpha"} & presets.default_options("tlora").keys()
    if more:
        assert f"Learning rate (default: {rates.tiny:g} for models below 100 million" in shown


def test_a_comparison_reports_its_runs_on_standard_error(tlora, monkeypatch, caplog):
    from tlora.compare import compare

    def run(config, tell):
        tell("run 1 of 2 starts")
        raise ConfigError("no more.", where="compare")

    monkeypatch.setattr(compare, "run", run)
    code, out, _ = tlora(
        *("compare", "--methods", "lora", "--learning_rates", "1e-3", "--model", "m"),
        *("--train_file", "a.jsonl", "--test_file", "b.jsonl", "--validation", "4"),
    )
    assert (code, out) == (2, "")
    assert caplog.messages == ["run 1 of 2 starts"]


def test_flags_win_over_files_and_files_over_defaults(resolved, run_yaml):
    file = run_yaml("model: from-file\nseed: 5\nadapter: {r: 4}\ndata: {max_length: 64}\n")
    run = resolved("--config", file, "--seed", "6", "--adapter.lora_alpha", "2")
    assert (run["model"], run["seed"], run["task"]) == ("from-file", 6, "jsonl")
    assert (run["adapter"]["r"], run["adapter"]["lora_alpha"]) == (4, 2)
    assert run["data"]["max_length"] == 64
    assert run["data"]["loss_on"] == "response"


EMPTY = "model: m\nadapter:\ntrainer:\ndata:\ncalibration:\n"


@pytest.mark.parametrize("empty_first", [True, False])
def test_an_empty_section_takes_nothing_away_from_another_file(resolved, run_yaml, empty_first):
    full = run_yaml("adapter: {r: 4}\ndata: {max_length: 7}\n", "full.yaml")
    files = [run_yaml(EMPTY, "empty.yaml"), full]
    words = [f"--config={file}" for file in (files if empty_first else files[::-1])]
    run = resolved(*words)
    assert (run["model"], run["adapter"]["r"], run["data"]["max_length"]) == ("m", 4, 7)
    preset = resolved("--preset", "paper-math", *words)
    assert preset["adapter"]["r"] == 4


def test_flags_come_before_files_and_each_other_at_any_depth(resolved, run_yaml):
    file = run_yaml("trainer: {lr_scheduler_kwargs: {num_cycles: 2, min_lr: 0.1}, max_steps: 5}")
    flags = ["--trainer.lr_scheduler_kwargs.num_cycles", "3", "--trainer", "max_steps=7,bf16=false"]
    assert resolved(*flags, "--config", file)["trainer"] == {
        "lr_scheduler_kwargs": {"num_cycles": 3, "min_lr": 0.1},
        "max_steps": 7,
        "bf16": False,
    }


def test_what_a_later_file_or_flag_gives_replaces_what_was_there(resolved, run_yaml):
    first = run_yaml("trainer: {lr_scheduler_kwargs: {num_cycles: 2}, max_steps: 5}", "1.yaml")
    second = run_yaml("trainer: {lr_scheduler_kwargs: {power: 2}}", "2.yaml")
    files = ["--config", first, "--config", second]
    assert resolved(*files)["trainer"] == {"lr_scheduler_kwargs": {"power": 2}, "max_steps": 5}
    whole = [*files, "--trainer.lr_scheduler_kwargs"]
    assert resolved(*whole, "{z: 1}")["trainer"]["lr_scheduler_kwargs"] == {"z": 1}
    assert resolved(*whole, "null")["trainer"]["lr_scheduler_kwargs"] is None


@pytest.mark.parametrize(("text", "value"), [("True", True), ("off", False), ("false", False)])
def test_a_switch_takes_a_word_of_its_own(resolved, text, value):
    assert resolved("--trust_remote_code", text)["trust_remote_code"] is value


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--output_dir", "5", "5"),  # a field of text takes every text as it is
        ("--model", "null", None),
        ("--data.prompt_template", "Q: {question} # 1", "Q: {question} # 1"),
        ("--data.label_names", "no,yes", ["no", "yes"]),
        ("--data.label_names", "[a, b]", ["a", "b"]),
        ("--trainer.run_name", "2024-01-31", "2024-01-31"),
        ("--trainer.run_name", "*broken", "*broken"),
        ("--trainer.run_name", "probe #3", "probe #3"),
        ("--trainer.run_name", "", ""),
        ("--seed", "010", 10),
        ("--adapter.memory_budget", "1e9", 1e9),
        ("--adapter.lora_alpha", "1e1", 10.0),
        ("--adapter.target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_a_value_is_read_as_its_field_takes_it(resolved, run_yaml, flag, text, value):
    run = resolved(flag, text)
    assert resolved("--config", run_yaml(yaml.safe_dump(run))) == run
    for name in flag[2:].split("."):
        run = run[name]
    assert run == value


def test_what_looks_like_a_number_is_printed_so_that_it_stays_text(tlora, run_yaml):
    file = run_yaml("trainer: {run_name: '1e-4'}\n")
    _, out, _ = tlora("train", "--config", file, "--print_config")
    again = tlora("train", "--config", run_yaml(out, "again.yaml"), "--print_config")[1]
    assert again == out
    assert yaml.safe_load(out)["trainer"]["run_name"] == "1e-4"


def test_the_runs_seed_is_the_methods_unless_it_has_its_own(resolved):
    assert resolved("--seed", "7")["adapter"]["seed"] == 7
    assert resolved("--seed", "7", "--adapter.seed", "1")["adapter"]["seed"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "tlora: command line: there is no verb 'trian'. Did you mean 'train'?"),
        (
            ["train", "--dry_run"],
            "`tlora init --dry_run` shows what a run of the same flags takes.",
        ),
        (["train", "--modle", "x"], "there is no flag `--modle`. Did you mean '--model'?"),
        (
            ["train", "--adaptor.r", "3"],
            "there is no flag `--adaptor.r`. Did you mean '--adapter.r'?",
        ),
        (
            ["eval", "--judge.reqest.seed", "3"],
            "there is no flag `--judge.reqest.seed`. Did you mean '--judge.request.seed'?",
        ),
        (["train", "--seed", "x"], "`seed` is 'x'; give a whole number from 0 to 2**32 - 1."),
        (["train", "--seed"], "--seed needs a value."),
        (
            ["list", "method"],
            "`what` is 'method'; choose one of 'methods', 'tasks', 'formats', 'evaluations',"
            " 'presets'. Did you mean 'methods'?",
        ),
        (["train", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["train", "--model", "m", "--method", "lara"], "no method 'lara'. Did you mean 'lora'?"),
        (
            ["train", "--model", "m", "--adapter.use_rslora", "true"],
            "`use_rslora` is refused: task-aware LoRA sets every module's scale itself",
        ),
        (
            ["train", "--model", "m", "--trainer.learning_rat", "1"],
            "trainer: there is no field `learning_rat`. Did you mean 'learning_rate'?",
        ),
        (["train"], "`model` is missing; give --model"),
        (
            ["train", "stray"],
            "unexpected word 'stray'; give flags as --name value, and files as a.yaml.",
        ),
        (["inspect"], "`path` is missing; `tlora inspect` needs a run's folder"),
        (["compare", "--learning_rates", "fast"], "`learning_rates` is ['fast']; give positive"),
        (["inspect", "nowhere"], "there is no run or adapter 'nowhere'; give the folder of one"),
        (["inspect", "."], "there is no plan.safetensors and no adapter; give the folder of a run"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tlora, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = tlora(*argv)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_of_a_file_are_all_named_with_suggestions(tlora, run_yaml):
    file = run_yaml("modle: m\ndta: {max_length: 3}\ndata: {max_lngth: 3}\nadaptor: {r: 2}\n")
    code, _, err = tlora("train", "--config", file)
    assert code == 2
    for fault in (
        "there is no field `modle`. Did you mean 'model'?",
        "there is no field `dta`. Did you mean 'data'?",
        "there is no field `data.max_lngth`. Did you mean 'data.max_length'?",
        "there is no field `adaptor`. Did you mean 'adapter'?",
    ):
        assert f"{file}: {fault}" in err


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: [\n"])
def test_a_file_that_is_no_mapping_is_named(tlora, run_yaml, text):
    file = run_yaml(text)
    code, _, err = tlora("train", "--config", file)
    assert code == 2
    assert f"command line: {file}: " in err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("rows.jsonl, row 3: no text."), 2, "tlora: rows.jsonl, row 3: no text.\n"),
        (AdapterError("out does not fit."), 2, "tlora: out does not fit.\n"),
        (CalibrationError("the loss is NaN."), 2, "tlora: the loss is NaN.\n"),
        (OutOfMemoryError("out of memory."), 1, "tlora: out of memory.\n"),
        (SandboxError("no sandbox."), 1, "tlora: no sandbox.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "tlora: no space left on the disk; "),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "tlora: no space"),
        (OSError(errno.EROFS, "Read-only", "/x"), 2, "tlora: /x: Read-only; check the path"),
        (OSError("without a number: a bug"), 1, "Traceback (most recent call last)"),
        (KeyboardInterrupt("stopped."), 130, "tlora: stopped.\n"),
        (RuntimeError("a bug"), 1, "Traceback (most recent call last)"),
    ],
)
def test_exit_codes(tlora, monkeypatch, error, code, says):
    def fail(config):
        raise error

    monkeypatch.setattr("tlora.training.train.run", fail)
    done, _, err = tlora("train", "--model", "m")
    assert done == code
    assert err.startswith(says)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_ctrl_c_says_what_the_same_command_does(tlora, monkeypatch, verb):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    again = {
        "train": "; rerun the same command to resume from the last checkpoint",
        "init": "; rerun the same command to start over",
        "demo": "; rerun the same command to continue; finished methods are kept",
        "eval": "; rerun the same command to continue; finished pairs of model and task are kept",
        "compare": "; rerun the same command to continue; finished runs are kept",
    }
    assert tlora(verb) == (130, "", f"tlora: interrupted{again.get(verb, '')}.\n")


@pytest.mark.parametrize("verb", ["demo", "eval", "compare", "inspect", "list"])
def test_verbs_that_continue_by_themselves_say_so_where_resume_is_given(tlora, verb):
    code, _, err = tlora(verb, "--resume")
    assert code == 2
    assert err == (
        "tlora: command line: there is no flag `--resume`. Rerun the same command to continue: no"
        " flag is needed.\n"
    )


def test_list_shows_a_line_for_each_registered_name(tlora):
    from tlora.registry import CONVERSATIONS, EVALUATIONS, METHODS, TASKS

    code, out, _ = tlora("list", "methods")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [*METHODS.names(), "peft:TYPE"]
    tasks = [line.split()[0] for line in tlora("list", "tasks")[1].splitlines()]
    assert tasks == [*TASKS.names(), "evaluations", *EVALUATIONS.names(), *CONVERSATIONS.names()]
    everything = tlora("list")[1]
    assert "methods\n" in everything
    assert "registered" not in everything  # kinds without a name are left out


def test_init_inspect_and_train_end_to_end(tlora, tmp_path, saved, tiny_llama):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n}+1?", "response": f" {n + 1}"}) + "\n" for n in range(8))
    )
    common = ["--model", saved(tiny_llama()), "--train_file", rows, "--adapter.r", "2"]
    common += ["--calibration.samples", "4", "--trainer.use_cpu", "true"]
    code, out, err = tlora("init", *common, "--output_dir", tmp_path / "init")
    assert code == 0, err
    assert "14 modules, each with rank 2 and scale 4" in out
    code, out, err = tlora("inspect", tmp_path / "init", "--by", "projection")
    assert code == 0, err
    assert "down_proj" in out
    assert "captured energy" in (tmp_path / "init" / "plan.html").read_text(encoding="utf-8")
    training = ["train", *common, "--output_dir", tmp_path / "run", "--eval_file", rows]
    training += ["--trainer.max_steps", "2", "--trainer.save_strategy", "no"]
    code, _, err = tlora(*training)
    assert code == 2
    assert "of 8 training rows, 8 repeat a prompt of" in err
    code, out, err = tlora(*training, "--data.overlap", "allow")
    assert code == 0, err
    assert re.search(
        r"^On the 8 held-out rows: loss \d\.\d{3}, .*token accuracy 0\.\d{3}\.$", out, re.M
    )
    run = tmp_path / "run"
    assert out.splitlines()[-1] == (
        f"Next: tlora chat {run} · tlora eval {run} --with_base --test_file FILE ·"
        f" tlora export {run} --for vllm --output_dir served"
    )
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    for command in (
        ["init", *common, "--output_dir", tmp_path / "init"],
        [*training, "--data.overlap", "allow"],
        ["train", "--resume", "--output_dir", tmp_path / "run"],
    ):
        code, out, err = tlora(*command)
        assert code == 0, err
        assert f"adapter: {command[command.index('--output_dir') + 1] / 'adapter'}" in out
        trains = "init" not in command
        assert (out.count("Next: "), out.count("held-out rows: loss ")) == (trains, trains)


@pytest.mark.parametrize("value", ["-1", "0", "1.5", "nan", "1e999"])
def test_a_number_of_validation_rows_is_no_file(tlora, value):
    code, _, err = tlora("compare", f"--validation={value}", "--print_config")
    assert code == 2
    assert "`validation` is " in err
    assert "; give a file, a fraction below 1 or a number of rows." in err


@pytest.mark.parametrize("verb", ["init", "train"])
@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null/run", "a" * 300])
def test_a_folder_that_cannot_be_made_is_named(tlora, verb, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = tlora(verb, "--model", "m", "--output_dir", place)
    assert code == 2
    assert err.startswith("tlora: ")
    assert place[:80] in err
    assert len(err.splitlines()) == 1


def test_a_warning_is_its_text_alone(tlora, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    tlora("--version")
    assert warnings.formatwarning("be careful", UserWarning, "file.py", 3) == "be careful\n"


@pytest.mark.parametrize("verb", ["inspect", "export", "verify", "chat"])
def test_a_misspelled_run_is_named_with_the_one_beside_it(tlora, verb, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    more = ["--for", "vllm", "--output_dir", "out"] if verb == "export" else []
    code, _, err = tlora(verb, "runn", *more)
    assert code == 2
    what = "model, run or adapter" if verb == "chat" else "run or adapter"
    assert err.endswith(
        f"there is no {what} 'runn'; give the folder of one (`hf download` fetches one from"
        " the Hub). Did you mean 'run'?\n"
    )
