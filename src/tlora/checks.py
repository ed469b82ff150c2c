"""Checks option values against type hints; the only place that does.

A record is a dataclass whose hints carry bounds beside types: ``Annotated[int, at_least(1)]``.
Every invalid value becomes a sentence, and all sentences of a record are raised in one
``ConfigError``. Only rules between several fields are written by hand, in ``relations``.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

from tlora import credentials
from tlora.errors import ConfigError, did_you_mean, unknown_names

AnySection = TypeVar("AnySection", bound="Section")
AnyRow = TypeVar("AnyRow")


@dataclass(frozen=True)
class Rule:
    """A condition on a value beside its type."""

    words: str
    """The valid values, as in "give ..."; `{}` stands for the name of the type."""
    holds: Callable[[Any], bool]
    """Whether a value of the right type is valid."""


def at_least(low: int) -> Rule:
    """Return the rule of numbers that are at least ``low``."""
    return Rule(f"{{}}, {low} or more", lambda value: value >= low)


POSITIVE = Rule("a positive number", lambda value: value > 0)
SEED = Rule("a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
"""The seeds that NumPy accepts."""
PROBABILITY = Rule("a probability in [0, 1)", lambda value: 0 <= value < 1)
FOLDER = Rule("the name of a folder", bool)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


Pattern = Annotated[str, Rule("a regular expression that compiles", _compiles)]
"""Patterns that PEFT matches names by."""

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_MANY = {int: "whole numbers", float: "numbers", str: "names"}


def fault(name: str, kind: Any, value: Any) -> list[str]:
    """Return a sentence if ``value`` is invalid for the field ``name`` of type ``kind``, else None.

    A bool is not a number, nor is a number that is not finite, and a string is not a list. Types
    that are not plain (a class of another library) accept every value.
    """
    if takes(kind, value):
        return []
    if known := choices(kind):
        hint = did_you_mean(value, known) if isinstance(value, str) else ""
        return [f"`{name}` is {value!r}; choose one of {', '.join(map(repr, known))}.{hint}"]
    too_large = isinstance(value, int) and abs(value) > _MOST
    return [f"`{name}` is {value!r}; give {'64 bits at most' if too_large else words(kind)}."]


def takes(kind: Any, value: Any) -> bool:
    """Return whether ``value`` is valid for a field of type ``kind``."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return takes(inside[0], value) and all(rule.holds(value) for rule in inside[1:])
    if origin in (Union, types.UnionType):
        return any(takes(part, value) for part in inside)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in inside)
    if kind in (int, float):
        number = int if kind is int else (int, float)
        most = _MOST if isinstance(value, int) else sys.float_info.max
        return isinstance(value, number) and not isinstance(value, bool) and -most <= value <= most
    bare = origin or kind
    known = bare in _PLAIN or is_section(bare)
    if (known and not isinstance(value, bare)) or (bare is str and _UNWRITABLE.search(value)):
        return False
    rows = value.items() if origin is dict else zip(value) if origin is list else ()
    return all(all(map(takes, inside, row)) for row in rows)


_MOST = 2**63 - 1
"""What the integers of torch, and of most readers of JSON, hold."""
_PLAIN = (bool, str, dict, list, type(None))
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""The null character, which no file name can contain, and surrogates, which represent bytes that
are not UTF-8."""


def plain(value: Any) -> Any:
    """Return the JSON form of a tuple, a set of names, or a member of an enumeration of strings."""
    if isinstance(value, str) and isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


_NAMES = re.compile(r"\s*[A-Za-z_][\w.-]*(\s*,\s*[A-Za-z_][\w.-]*)+\s*")
"""Names separated by commas. A module's name has no comma, so this is not a regex of one."""


def fitted(kind: Any, value: Any) -> Any:
    """Return ``value`` in the form that a field of type ``kind`` stores.

    If the field accepts a list of names, "a, b" becomes the list of these names; if it also accepts
    a string (a regex), only if the value is nothing but names with commas.
    """
    value = plain(value)
    if not isinstance(value, str):
        return value
    if _NAMES.fullmatch(value) and takes(kind, [value]):
        return [word.strip() for word in value.split(",")]
    if not takes(kind, value) and Pattern not in _parts(kind):
        names = [word.strip() for word in value.split(",")]
        return names if all(names) and takes(kind, names) else value
    return value


def item_of(kind: Any) -> Any:
    """Return the item type of a list, or of a list or None; else None."""
    first, *others = _parts(kind)
    if typing.get_origin(first) is Annotated:
        first = typing.get_args(first)[0]
    listed = not others and typing.get_origin(first) is list
    return typing.get_args(first)[0] if listed else None


def words(kind: Any) -> str:
    """Describe the valid values of a field of type ``kind`` in words."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return str(inside[1].words).format(words(inside[0]))
    if origin is Literal:
        return " or ".join(map(repr, inside))
    if origin is list:
        item = typing.get_args(inside[0])[0] if inside[0] == Pattern else inside[0]
        return f"a list of {_MANY[item]}" if item in _MANY else "a list like [a, b]"
    if dict in (origin, kind) or is_section(kind):
        return "`name: value` pairs"
    if origin in (Union, types.UnionType):
        said = [words(part) for part in _parts(kind)]
        return (", or " if "," in said[0] else " or ").join(said)
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def choices(kind: Any) -> list[Any]:
    """Return the values that a type lists, if it accepts no others (except None)."""
    if any(typing.get_origin(part) is not Literal for part in _parts(kind)):
        return []
    return [option for part in _parts(kind) for option in typing.get_args(part)]


def _parts(kind: Any) -> list[Any]:
    """Return the members of a union except None; for another type, the type itself."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return [kind]
    return [part for part in typing.get_args(kind) if part is not type(None)]


def is_section(kind: Any) -> bool:
    """Return whether a field of type ``kind`` holds a nested record."""
    return isinstance(kind, type) and issubclass(kind, Section)


def _hints(record: Any) -> dict[str, Any]:
    known = typing.get_type_hints(record, include_extras=True)
    return {field.name: known[field.name] for field in dataclasses.fields(record)}


hints: Callable[[Any], dict[str, Any]] = functools.cache(_hints)
"""Return the type of each field of a record, bounds included."""


class Section:
    """A base for dataclasses whose `faults` describe invalid values.

    A field that accepts a list of names but no string turns "a, b" into the list of these names.
    Tuples and sets become lists (sets sorted), members of an enumeration their values.

    Raises:
        ConfigError: a name is unknown; the sentence suggests the nearest one.
    """

    where: ClassVar[str] = "configuration"
    """The subject in error messages."""
    prefix: ClassVar[str] = ""
    """Prefix of a field's name in sentences: "data."."""
    noun: ClassVar[str] = "field"
    """A field's name in sentences."""

    def __new__(cls, *args: Any, **values: Any) -> Any:
        # Before __init__, so that an unknown name gets our message instead of a bare TypeError.
        if faults := cls.name_faults(values):
            known = {name: value for name, value in values.items() if name in cls.field_names()}
            raise ConfigError([*faults, *_faults_of(cls, known)], where=cls.where)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, kind in hints(type(self)).items():
            setattr(self, name, fitted(kind, getattr(self, name)))

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the fields, in the order of declaration."""
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def name_faults(cls, values: dict[str, Any], elsewhere: Sequence[str] = ()) -> list[str]:
        """Return a sentence for each name that is not a field, perhaps suggesting ``elsewhere``."""
        known = [f"{cls.prefix}{name}" for name in cls.field_names()]
        names = [f"{cls.prefix}{name}" for name in values]
        return unknown_names(names, known, cls.noun, elsewhere)

    def faults(self) -> list[str]:
        """Return a sentence for each invalid value."""
        found: list[str] = []
        sound = copy.copy(self)
        named: tuple[str, ...] = ()
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            kind, value = hints(type(self))[field.name], getattr(self, field.name)
            if is_section(kind) and isinstance(value, kind):
                found += value.faults()
            elif wrong := self._value_faults(field.metadata.get("typed", field.name), kind, value):
                found += wrong
                named += (f"`{self.prefix}{field.name}` ", *field.metadata.get("typed", "").split())
                vars(sound)[field.name] = default_of(field)
        # Relations see the default instead of each invalid value, so they never meet a wrong type;
        # their complaints about such a default are dropped. A required field has no default.
        if dataclasses.MISSING in vars(sound).values():
            return found
        return found + [
            each for each in sound.relations() if not any(name in each for name in named)
        ]

    def _value_faults(self, name: str, kind: Any, value: Any) -> list[str]:
        """Describe the fault of one value; a credential is refused before anything quotes it."""
        name = f"{self.prefix}{name}"
        return [*credentials.faults(name, value)] or fault(name, kind, value)

    def relations(self) -> Iterator[str]:
        """Yield a sentence for each fault between fields; their types are valid."""
        yield from ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[AnySection], values: dict[str, Any]) -> AnySection:
        """Make a record from plain values; the inverse of `to_dict`. A section may be None: empty.

        Raises:
            ConfigError: a name is unknown (with a suggestion) or a value out of range; all faults
                are collected into one error.
        """
        faults: list[str] = []
        given = {str(name): value for name, value in values.items()}
        for name, kind in hints(cls).items():
            if name not in given:
                continue
            if given[name] is None and (is_section(kind) or typing.get_origin(kind) is dict):
                given[name] = {}
            if is_section(kind) and isinstance(given[name], dict):
                try:
                    given[name] = kind.from_dict(given[name])
                except ConfigError as error:
                    faults += error.faults
                    del given[name]
        if not faults:
            return cls(**given)
        raise ConfigError([*faults, *_faults_of(cls, given)], where=cls.where)


class Record(Section):
    """A base for dataclasses that are checked on construction.

    Raises:
        ConfigError: a name is unknown (with a suggestion) or a value out of range; all faults are
            collected into one error.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if faults := self.faults():
            raise ConfigError(faults, where=self.where)


def default_of(field: Any) -> Any:
    """Return the default of a dataclass field; MISSING if it has none."""
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def from_row(record: type[AnyRow], row: Any, **given: Any) -> AnyRow:
    """Make a dataclass from a row of a file, checking the type of each value.

    Args:
        record: a dataclass that does not check itself.
        row: expected to be a mapping of its fields.
        **given: further fields, which are not checked.

    Raises:
        ConfigError: it is not a mapping, or a field is missing, unknown or of the wrong type.
    """
    if not isinstance(row, dict):
        raise ConfigError(f"{row!r} stands where `name: value` pairs belong.", record.__name__)
    known = hints(record)
    fields: tuple[Any, ...] = dataclasses.fields(record)  # type: ignore[arg-type]
    needed = [field.name for field in fields if default_of(field) is dataclasses.MISSING]
    faults = unknown_names(map(str, row), [*known], "field")
    faults += [f"`{name}` is missing." for name in needed if name not in {**row, **given}]
    for name in row.keys() & known.keys():
        faults += fault(name, known[name], row[name])
    if faults:
        raise ConfigError(faults, record.__name__)
    return record(**row, **given)


def _faults_of(record: type[Section], values: dict[str, Any]) -> list[str]:
    try:
        return record(**values).faults()
    except ConfigError as error:
        return list(error.faults)
