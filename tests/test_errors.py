"""Errors that are collected are raised as one."""

import doctest

import pytest

from tlora import errors
from tlora.errors import AdapterError, ConfigError, DataError, Faults


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
