"""How flags become the fields of a record; contracts/bad_inputs/flags.yaml has the wrong ones."""

from __future__ import annotations

import pytest

from tlora import TLoraConfig
from tlora.errors import ConfigError
from tlora.parsing import parse
from tlora.training.runconfig import RunConfig
from tlora.verbconfig import InspectConfig


def test_names_of_modules_with_commas_are_so_many_modules():
    words = ["--adapter.target_modules", "q_proj,v_proj"]
    given = parse("tlora", RunConfig, words).record.adapter["target_modules"]
    assert TLoraConfig(target_modules=given).target_modules == ["q_proj", "v_proj"]


def test_words_without_a_flag_fill_the_places_in_order():
    one, other = (parse("tlora", InspectConfig, words).record for words in (["a"], ["a", "b"]))
    assert (one.path, one.against) == ("a", None)
    assert (other.path, other.against) == ("a", "b")
    assert parse("tlora", InspectConfig, ["a", "--against", "b"]).record == other
    with pytest.raises(ConfigError, match="unexpected word 'c'"):
        parse("tlora", InspectConfig, ["a", "b", "c"])
