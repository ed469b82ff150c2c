"""What fields take, by their type hints, and how records tell what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

import pytest

from tlora.checks import POSITIVE, PROBABILITY, Record, Section, at_least, fault, fitted, takes
from tlora.config import TLoraConfig
from tlora.errors import ConfigError
from tlora.methods.options import LoraOptions
from tlora.training.runconfig import RunConfig

Color = Enum("Color", "red")
Mode = Literal["auto", "exact"]
Size = Annotated[int, at_least(1)] | Literal["auto"]

GOOD: list[tuple[Any, Any]] = [
    (int, 0),
    (float, 0),
    (float, -1.5),
    (float, 2**63 - 1),
    (bool, False),
    (str, ""),
    (int | None, None),
    (Annotated[int, at_least(1)] | None, None),
    (Annotated[int, at_least(1)], 1),
    (Annotated[float, PROBABILITY], 0),
    (Mode, "exact"),
    (bool | Literal["half"], "half"),
    (Size, "auto"),
    (list[int], []),
    (list[str] | None, ["a"]),
    (dict[str, Any], {}),
    (Any, object()),
    (Color | str, 3),  # a class of another library is its own judge
]

BAD: list[tuple[Any, Any, str]] = [
    *[(int, bad, "give a whole number.") for bad in (True, 1.0, "1", None, [1])],
    *[(float, bad, "give a number.") for bad in (True, "1e-4", None, float("nan"), float("inf"))],
    *[(kind, bad, "give 64 bits at most.") for kind in (int, float) for bad in (2**63, -(10**400))],
    *[(bool, bad, "give true or false.") for bad in (1, "true", None)],
    *[(str, bad, "give text.") for bad in (1, None, ["a"])],
    *[(Annotated[int, at_least(1)], bad, "give a whole number, 1 or more.") for bad in (0, 2.0)],
    (Annotated[int, at_least(1)] | None, 0, "give a whole number, 1 or more."),
    (Annotated[float, at_least(0)], -1, "give a number, 0 or more."),
    *[(Annotated[float, POSITIVE], bad, "give a positive number.") for bad in (0, "1", True)],
    *[(Annotated[float, PROBABILITY], bad, "give a probability in [0, 1).") for bad in (1, -0.1)],
    (Mode, 3, "choose one of 'auto', 'exact'."),
    (Mode | None, "exat", "choose one of 'auto', 'exact'. Did you mean 'exact'?"),
    (bool | Literal["half"], 1, "give true or false or 'half'."),
    (Size, 0, "give a whole number, 1 or more, or 'auto'."),
    *[(list[str], bad, "give a list of names.") for bad in (3, [3], None, {"a": 1})],
    (list[float], ["1"], "give a list of numbers."),
    (str | list[str], 3, "give text or a list of names."),
    (dict[str, Any], ["a"], "give `name: value` pairs."),
]


@pytest.mark.parametrize(("kind", "value"), GOOD)
def test_a_field_takes_what_its_type_says(kind, value):
    assert takes(kind, value)
    assert fault("x", kind, value) == []


@pytest.mark.parametrize(("kind", "value", "advice"), BAD)
def test_all_else_is_a_sentence_that_names_field_and_value(kind, value, advice):
    assert fault("x", kind, value) == [f"`x` is {value!r}; {advice}"]


@dataclass(kw_only=True)
class Inner(Section):
    where: ClassVar[str] = "inner"
    prefix: ClassVar[str] = "inner."

    size: Annotated[int, at_least(1)] = 4
    names: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Outer(Record):
    where: ClassVar[str] = "outer"

    low: int = 0
    high: int = 9
    more: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)

    def relations(self) -> Iterator[str]:
        if self.low > self.high:
            yield f"`low` ({self.low}) is above `high` ({self.high})."
        if self.inner.names and not self.more:
            yield "`inner.names` without `more`."


def faults_of(make, *args, **values):
    with pytest.raises(ConfigError) as caught:
        make(*args, **values)
    assert caught.value.where == "outer"
    return list(caught.value.faults)


def test_names_values_sections_and_relations_come_in_one_error():
    found = faults_of(Outer, hihg=3, low="x", inner=Inner(size=0, names="a"))
    assert found == [
        "there is no field `hihg`. Did you mean 'high'?",
        "`low` is 'x'; give a whole number.",
        "`inner.size` is 0; give a whole number, 1 or more.",
        "`inner.names` without `more`.",
    ]


def test_a_relation_never_meets_a_value_of_the_wrong_type():
    assert faults_of(Outer, low="x", high=-1) == ["`low` is 'x'; give a whole number."]
    assert faults_of(Outer, low=3, high=2) == ["`low` (3) is above `high` (2)."]
    assert faults_of(Outer, inner=3) == ["`inner` is 3; give `name: value` pairs."]


def test_a_wrong_value_of_a_field_without_a_default_is_told_alone():
    @dataclass(kw_only=True)
    class Needing(Record):
        paths: list[str]

        def relations(self):
            yield f"{len(self.paths)} paths"

    with pytest.raises(ConfigError, match="`paths` is 5; give a list of names") as caught:
        Needing(paths=5)
    assert len(caught.value.faults) == 1


def test_a_section_alone_tells_and_does_not_raise():
    assert Inner(size=0).faults() == ["`inner.size` is 0; give a whole number, 1 or more."]
    with pytest.raises(ConfigError, match=r"inner: there is no field `inner\.sise`"):
        Inner(sise=3)


def test_plain_values_make_a_record_and_back():
    record = Outer(low=1, more={"a": None}, inner=Inner(names=["x"]))
    assert Outer.from_dict(record.to_dict()) == record
    assert Outer.from_dict({"more": None, "inner": None}) == Outer()
    assert faults_of(Outer.from_dict, {"lo": 1, "high": "x", "inner": {"siz": 2, "names": 3}}) == [
        "there is no field `inner.siz`. Did you mean 'inner.size'?",
        "`inner.names` is 3; give a list of names.",
        "there is no field `lo`. Did you mean 'low'?",
        "`high` is 'x'; give a whole number.",
    ]


def test_a_name_alone_is_a_list_of_one():
    assert Inner(names="a").names == ["a"]
    assert Inner(names="lm_head, score").names == ["lm_head", "score"]


def test_text_is_a_list_of_names_only_where_a_field_takes_no_text():
    for both in (str | list[str] | None, list[str]):
        assert fitted(both, "q_proj,v_proj") == ["q_proj", "v_proj"]
        assert fitted(both, " layers.0.q_proj , k-proj") == ["layers.0.q_proj", "k-proj"]
    for regex in (r".*layers\.\d{1,2}\..*q_proj", "q_proj|v_proj", "all-linear", "a,", ",a"):
        assert fitted(str | list[str], regex) == regex
    assert fitted(str, "a,b") == "a,b"
    assert fitted(list[str] | None, "lm_head") == ["lm_head"]
    assert fitted(str | list[str], "lm_head") == "lm_head"
    assert fitted(list[int], "1") == "1"
    assert [fitted(list[str], empty) for empty in ("", "a,", " ")] == ["", "a,", " "]


@pytest.mark.parametrize("text", ["((", "*a", "[z", "(?P<x", "a{99999999999}", "(?<=a*)b"])
@pytest.mark.parametrize("options", [TLoraConfig, LoraOptions])
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_a_regular_expression_that_does_not_compile_is_a_fault(options, name, text):
    with pytest.raises(ConfigError, match="give a regular expression that compiles or a list"):
        options(**{name: text})


@pytest.mark.parametrize("field", ["adapter", "trainer"])
def test_names_are_texts(field):
    with pytest.raises(ConfigError, match=rf"`{field}` is \{{1: 2\}}; give `name: value` pairs"):
        RunConfig(**{field: {1: 2}})


@pytest.mark.parametrize("text", ["a\0b", "\udce9"])
def test_a_text_that_no_file_can_hold_is_none(text):
    with pytest.raises(ConfigError, match=r"`model` is .*; give text"):
        RunConfig(model=text)


def test_a_name_that_is_no_text_is_unknown():
    with pytest.raises(ConfigError, match="there is no field `1`"):
        RunConfig.from_dict({1: 2})
