"""Errors that are collected are raised as one."""

import doctest
import errno
import json

import pytest

from tlora import errors
from tlora.errors import (
    AdapterError,
    ArtifactError,
    ConfigError,
    DataError,
    Faults,
    damaged,
    did_you_mean,
    system_fault,
)


def collected(where, *found):
    faults = Faults(where)
    for error in found:
        with faults:
            raise error
    return faults


def test_the_example_is_right():
    assert doctest.testmod(errors, optionflags=doctest.IGNORE_EXCEPTION_DETAIL).failed == 0


def test_nothing_found_raises_nothing():
    faults = Faults("run")
    with faults:
        pass
    faults.raise_found()


@pytest.mark.parametrize("error", [DataError("gone"), ConfigError(["one", "two"], "trainer")])
def test_a_lone_error_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised:
        collected("run", error).raise_found()
    assert raised.value is error


def test_several_errors_become_one_that_says_where_each_is():
    inner = collected("data", DataError("a.jsonl: gone"), ConfigError("`x` is 1.", "data"))
    faults = collected("run", ConfigError(["`r` is 0.", "`s` is 0."], "adapter"))
    with faults:
        inner.raise_found()
    with pytest.raises(ConfigError) as raised:
        faults.raise_found()
    assert raised.value.where == "run"
    assert raised.value.faults == (
        "adapter: `r` is 0.",
        "adapter: `s` is 0.",
        "a.jsonl: gone",
        "data: `x` is 1.",
    )


def test_what_two_checks_say_alike_is_said_once():
    with pytest.raises(ConfigError, match=r"^task: there is no task 'x'\.$"):
        collected("run", *[ConfigError("there is no task 'x'.", "task")] * 2).raise_found()


def test_other_errors_pass():
    with pytest.raises(AdapterError):
        collected("run", AdapterError("does not fit"))


FLAGS = ["--model", "--seed", "--train_file", "--output_dir", "--data.kind", "--resume"]
FIELDS = ["learning_rate", "max_steps", "num_train_epochs", "weight_decay", "warmup_steps"]
OPTIONS = ["r", "lora_alpha", "target_modules", "rank_min", "rank_max", "seed"]


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("learning_rte", FIELDS, "learning_rate"),
        ("lr", FIELDS, "learning_rate"),
        ("epochs", FIELDS, "num_train_epochs"),
        ("rank", OPTIONS, "r"),
        ("alpha", OPTIONS, "lora_alpha"),
        ("rank_mn", OPTIONS, "rank_min"),
        ("Target_modules", OPTIONS, "target_modules"),
        ("--trian_file", FLAGS, "--train_file"),
        ("--modle", FLAGS, "--model"),
        ("--kind", FLAGS, "--data.kind"),
        ("--data.knd", FLAGS, "--data.kind"),
        ("--nonsense", FLAGS, None),
        ("--x", FLAGS, None),
        ("nonsense", FIELDS, None),
        ("data.2", ["data.kind", "data.overlap"], None),
        ("trainer.nothing", ["trainer.max_steps", "trainer.seed"], None),
        ("anything", [], None),
    ],
)
def test_a_suggestion_means_something(name, known, meant):
    assert did_you_mean(name, known) == (f" Did you mean {meant!r}?" if meant else "")


@pytest.mark.parametrize(
    "read",
    [
        lambda: {}["modules"],
        lambda: setattr(None, "keys", 1),
        lambda: 1 + "a",
        lambda: json.loads("["),
        lambda: (_ for _ in ()).throw(RecursionError),
        lambda: (_ for _ in ()).throw(ConfigError("`r` is 0.", "TLoraConfig")),
    ],
)
def test_whatever_a_damaged_file_does_to_its_reader_names_the_file(read):
    says = r"^a/plan: damaged \(.+\); make it again\.$"
    with pytest.raises(ArtifactError, match=says), damaged("a/plan"):
        read()


def test_memory_that_runs_out_is_no_damage():
    with pytest.raises(MemoryError), damaged("a/plan"):
        raise MemoryError


def test_only_what_the_system_refuses_is_a_system_fault():
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert system_fault(OSError(number, "x")).exit_code == 1
    for number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG):
        fault = system_fault(OSError(number, "why", "folder/file"))
        assert fault.exit_code == 2
        assert str(fault).startswith("folder/file: why; ")
    assert system_fault(OSError("no number")) is None
    foreign = RuntimeError('Error: Read-only file system (os error 30) at path "/a/.tmpX"')
    assert str(system_fault(foreign)).startswith("/a/.tmpX: Read-only file system; ")
    assert system_fault(RuntimeError("a bug")) is None
    for said in ("unexpected pos 64 vs 0", "basic_ios::clear: iostream error"):  # torch.save's
        assert str(system_fault(RuntimeError(said))).startswith("no space left on the disk; ")
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:28")
    assert system_fault(gone).exit_code == 1
    assert str(system_fault(gone)).startswith("another process of the launch has ended; ")
