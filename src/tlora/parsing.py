"""Flags and YAML -> a record: flags over files over presets over defaults.

A record is a dataclass; each field is a flag. A field that is itself a record gives dotted flags
(`--data.max_length`), a dict field takes any name below it (`--trainer.learning_rate`), which
whoever knows the names checks. What values a field takes is checked by the record (`checks`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from tlora.checks import Section, hints, is_section, item_of, takes
from tlora.errors import ConfigError, did_you_mean
from tlora.flags import Field, fields_of
from tlora.presets import path as preset_path
from tlora.registry import METHODS
from tlora.runconfig import RunConfig

_NULL = ("null", "~")
AnyRecord = TypeVar("AnyRecord", bound=Section)

_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
"""The numbers of YAML 1.2, `1e-4` among them, which YAML 1.1 and PyYAML take for text."""


@dataclasses.dataclass(frozen=True)
class Parsed(Generic[AnyRecord]):
    """What a command line says."""

    record: AnyRecord
    print_config: bool
    """Show the record instead of running."""


@dataclasses.dataclass
class _Words:
    """A command line, sorted: values are still text."""

    files: list[str] = dataclasses.field(default_factory=list)
    presets: list[str] = dataclasses.field(default_factory=list)
    flags: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    alone: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    print_config: bool = False


def parse(prog: str, record: type[AnyRecord], argv: list[str]) -> Parsed[AnyRecord]:
    """Read ``argv`` into a ``record``: flags over files over presets, wherever they stand.

    A first word that ends in .yaml is a file too: `tlora compare compare.yaml`.

    Args:
        prog: what the user typed so far.
        record: the dataclass to fill.
        argv: the words after the verb.

    Raises:
        ConfigError: a flag or a key of a file is unknown, or the record refuses a value.
    """
    fields = dict(fields_of(record))
    words = _sorted(argv, fields, presets=issubclass(record, RunConfig))
    faults = words.faults
    presets = [read_yaml(preset_path(name)) for name in words.presets]
    files = [read_yaml(file) for file in words.files]
    for name, values in zip(words.files, files, strict=True):
        faults += [f"{name}: {fault}" for fault in _unknown_keys(values, fields)]
    flags: dict[str, Any] = {}
    for name, text in words.flags:
        _set(flags, name, _read(fields, name, text))
    faults += _place_alone(words.alone, fields, flags)
    if faults:
        raise ConfigError(faults, where="command line")
    given: dict[str, Any] = functools.reduce(_over, [*files, flags], {})
    values = _over(_fitting(functools.reduce(_over, presets, {}), given), given)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            what = f"{field.help[0].lower()}{field.help[1:]}"
            raise ConfigError(f"`{name}` is missing; `{prog}` needs {what}", where="command line")
    return Parsed(record.from_dict(_with_floats(record, values)), words.print_config)


def _sorted(argv: list[str], fields: dict[str, Field], presets: bool) -> _Words:
    """Sort the words: files, presets, flags with their values, and words that stand alone."""
    found = _Words()
    lists = {"config": found.files} | ({"preset": found.presets} if presets else {})
    wanted = {"config": "a YAML file", "preset": "a name"}
    left = argv[::-1]
    if left and left[-1].endswith((".yaml", ".yml")) and not left[-1].startswith("-"):
        found.files.append(left.pop())
    while left:
        word = left.pop()
        if not word.startswith("--"):
            found.alone.append(word)
            continue
        flag, equals, text = word.partition("=")
        name = flag[2:] if _takes(flag[2:], fields) else flag[2:].replace("-", "_")
        if name == "print_config" and not equals:
            found.print_config = True
            continue
        known = _takes(name, fields) or name in lists
        switch = name in fields and fields[name].kind is bool
        if switch and not equals and left[-1:] not in (["true"], ["false"]):
            text = "true"
        elif not equals and left and not left[-1].startswith("--"):
            text = left.pop()
        elif not equals and known:
            found.faults.append(f"{flag} needs {wanted.get(name, 'a value')}.")
            continue
        if name in lists:
            lists[name].append(text)
        elif known:
            found.flags.append((name, text))
        else:
            names = [f"--{each}" for each in [*fields, *lists, "help", "print_config"]]
            found.faults.append(f"there is no flag `{flag}`.{_hint(flag, names, fields)}")
    return found


def _takes(name: str, fields: dict[str, Field]) -> bool:
    return name in fields or _above(name, fields) is not None


def _above(name: str, fields: dict[str, Field]) -> str | None:
    """Return the open field that ``name`` lies below, if there is one."""
    return next((n for n, f in fields.items() if f.open and name.startswith(f"{n}.")), None)


def _place_alone(
    alone: list[str], fields: dict[str, Field], values: dict[str, Any]
) -> Iterator[str]:
    """Give the words that stand alone to the field that takes them; yield a fault for the rest."""
    name, field = next(((n, f) for n, f in fields.items() if f.positional), (None, None))
    if alone and name and field:
        several = field.several
        values[name] = alone if several else alone.pop(0)
        alone = [] if several else alone
    for word in alone:
        yield f"there is no place for {word!r}; give flags as --name value."


def _hint(name: str, known: Iterable[str], fields: dict[str, Field]) -> str:
    """Suggest a name; for `adaptor.r` too, where the names below the section are open."""
    if name in ("--dry_run", "--dry-run"):
        return " `tlora init --dry_run` shows what a run of the same flags takes."
    dashes, words = "--" if name.startswith("--") else "", name.split(".")
    below = [
        ".".join([f"{dashes}{section}", *words[depth:]])
        for section, field in fields.items()
        if field.open and len(words) > (depth := section.count(".") + 1)
    ]
    return did_you_mean(name, [*known, *below])


def _unknown_keys(
    values: dict[str, Any], fields: dict[str, Field], prefix: str = ""
) -> Iterator[str]:
    known = [*fields, *{name.partition(".")[0] for name in fields}]
    for key, value in values.items():
        name = f"{prefix}{key}"
        section = any(each.startswith(f"{name}.") for each in fields)
        if section and isinstance(value, dict):
            yield from _unknown_keys(value, fields, f"{name}.")
        elif not section and name not in fields:
            yield f"there is no field `{name}`.{_hint(name, known, fields)}"


def _read(fields: dict[str, Field], name: str, text: str) -> Any:
    """Return the value that the text of a flag stands for."""
    if name not in fields:  # below an open field
        return _value(text)
    kind = fields[name].kind
    if fields[name].open:
        value = _value(text)
        if isinstance(value, dict) or "=" not in text:
            return value
        pairs = (pair.partition("=") for pair in text.split(","))
        return {key.strip(): _value(word.strip()) for key, _, word in pairs}
    if fields[name].several and text not in _NULL and not text.startswith("["):
        return [_fitted(item_of(kind), word.strip()) for word in text.split(",")]
    return _fitted(kind, text)


def _fitted(kind: Any, text: str) -> Any:
    """Return the text as it is where only text fits, else as YAML reads it."""
    value = None if text in _NULL else _value(text)
    if isinstance(value, str) or (value is None and text not in _NULL):
        return text
    # `--output_dir 5` is a name; `--validation 5` is a number.
    return text if not takes(kind, value) and takes(kind, text) else value


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError:
        return text


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = values = inner if isinstance(inner, dict) else {}
    old = values.get(last)
    values[last] = _over(old, value) if isinstance(old, dict) else value


def _over(below: Any, above: Any) -> Any:
    """Lay one value over another: dicts name by name; an empty section takes nothing away."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return below if isinstance(below, dict) and above is None else above
    return below | {name: _over(below.get(name), value) for name, value in above.items()}


def _with_floats(record: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with whole numbers as floats where the record has floats."""
    made = dict(values)
    for name, kind in hints(record).items():
        value = made.get(name)
        if is_section(kind) and isinstance(value, dict):
            made[name] = _with_floats(kind, value)
        elif name in made and takes(kind, floats := _as_floats(value)):
            made[name] = floats
    return made


def _as_floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_floats(item) for item in value]
    return float(value) if type(value) is int else value


def _fitting(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the preset without those options that the method lacks, as in a comparison.

    So `--preset NAME --method OTHER` is one command. What the user gave is for the method to judge.
    """
    if "adapter" not in preset:
        return preset
    method = given.get("method", preset.get("method", RunConfig.method))
    known = {field.name for field in dataclasses.fields(METHODS.load(method).options)}
    return preset | {"adapter": {k: v for k, v in preset["adapter"].items() if k in known}}


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a file of `field: value` lines, in which `1e-4` is a number.

    Raises:
        ConfigError: the file cannot be read, or is no YAML, or no mapping.
    """
    import yaml

    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), _loader())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).", "command line") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{file}: not YAML ({cause}).", where="command line") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{file}: give `field: value` lines.", where="command line")
    return values or {}


def to_yaml(record: Any) -> str:
    """Return a record as YAML that `--config` reads back into the same record."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that `read_yaml` would take for a number."""

    Dumper.add_implicit_resolver(*_FLOAT)
    values = dataclasses.asdict(record)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _loader() -> Any:
    """Return PyYAML's safe loader with the numbers of YAML 1.2, and with dates as text."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Never makes anything but plain values."""

    unwanted = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in unwanted]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(*_FLOAT)
    return Loader
