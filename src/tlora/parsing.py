"""Flags and YAML -> a record, with every unknown key met by a suggestion.

A record is a dataclass; each field is a flag. A field that is itself a dataclass gives dotted
flags (`--data.max_length`), a dict field takes any name below it (`--trainer.learning_rate`), to
be checked by whoever knows the names. jsonargparse reads the values by their types.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse

from tlora.errors import ConfigError, did_you_mean
from tlora.presets import path as preset_path
from tlora.registry import METHODS
from tlora.runconfig import RunConfig, field_docs

Record = TypeVar("Record")

_PRINT = "--print_config"
_PRESET = "--preset"
_SAID = (["true"], ["false"])  # words that a switch takes


@dataclasses.dataclass(frozen=True)
class Parsed(typing.Generic[Record]):
    """What a command line says."""

    record: Record
    print_config: bool
    """Show the record instead of running."""


class _Parser(jsonargparse.ArgumentParser):
    more_help = ""
    fields: dict[str, _Field]

    def format_help(self, *args: Any, **options: Any) -> str:
        return super().format_help(*args, **options) + self.more_help

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_plain(message, self.fields), where="command line") from ex


def parse(prog: str, record: type[Record], argv: list[str], more_help: str = "") -> Parsed[Record]:
    """Read ``argv`` into a ``record``: flags over files over defaults, wherever they stand.

    A first word that ends in .yaml is such a file too: `tlora compare compare.yaml`.

    Args:
        prog: what the user typed so far, for the usage line.
        record: the dataclass to fill.
        argv: the words after the verb.
        more_help: text to show below the flags.

    Raises:
        ConfigError: a flag or a key of a file is unknown, or a value is not of the field's type.
        SystemExit: --help was asked for and shown.
    """
    fields = _fields(record)
    parser = make_parser(prog, record)
    parser.more_help = more_help
    # jsonargparse's own --print_config, in its help, does not know the method's options.
    words = [_underscored(word, fields) for word in argv if word != _PRINT]
    if words and words[0].endswith((".yaml", ".yml")) and not words[0].startswith("-"):
        words[0] = f"--config={words[0]}"
    words = _gathered(words, fields)
    presets: list[str] = []
    if _takes_presets(record):
        presets, words = _split_option(words, _PRESET, "a name")
    files, flags = _split_option(words, "--config", "a YAML file")
    # The lowest layer: files and flags are laid over it.
    files = [*map(preset_path, presets), *files]
    faults = [fault for file in files for fault in _unknown_keys(file, fields)]
    faults += _unknown_flags(flags, fields, [_PRESET] if _takes_presets(record) else [])
    if faults:
        raise ConfigError(faults, where="command line")
    # jsonargparse lets the later of file and flag win; the files go first, so flags always do.
    values = parser.parse_args([*(_config_flag(file, fields) for file in files), *flags])
    _add_options(values, files, parser)
    if presets:
        given = _options(files[len(presets) :])
        given |= {flag.partition("=")[0].removeprefix("--adapter.") for flag in flags}
        values["adapter"] = _fitting(values, _options(files[: len(presets)]) - given)
    return Parsed(_build(record, values), print_config=_PRINT in argv)


def _words(fields: dict[str, _Field]) -> str:
    """Return what stands before the flags, for the usage line."""
    for name, field in fields.items():
        if field.positional and field.several:
            return f"[run.yaml] [{name} ...]"
        if field.positional:
            return name if field.required else f"[{name}]"
    return "[run.yaml]"


def make_parser(prog: str, record: type) -> _Parser:
    """Make the parser of one verb."""
    fields = _fields(record)
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {_words(fields)} [flags]",
        description=" ".join((record.__doc__ or "").split("\n\n")[0].split()),
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML of the fields below, or the first word; flags win."
    )
    if _takes_presets(record):
        parser.add_argument(
            _PRESET,
            help="Whole run by name, below files and flags; see `tlora list presets`. Another"
            " --method takes those of its `adapter` options that it has.",
        )
    parser.fields = fields
    for name, field in parser.fields.items():
        options: dict[str, Any] = {"type": field.type, "help": field.help.replace("%", "%%")}
        if field.positional and not field.several:
            if not field.required:
                options["nargs"] = "?"
            parser.add_argument(name, **options)
            continue
        if field.type is bool:
            options |= {"nargs": "?", "const": True}
        parser.add_argument(f"--{name}", default=field.default, **options)
    return parser


@dataclasses.dataclass(frozen=True)
class _Field:
    """One flag: a field of the record, or of a record inside it."""

    type: Any
    default: Any
    help: str
    positional: bool

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def open(self) -> bool:
        return typing.get_origin(self.type) is dict

    @property
    def several(self) -> bool:
        return typing.get_origin(self.type) is list


def _fields(record: Any, prefix: str = "") -> dict[str, _Field]:
    hints, docs = typing.get_type_hints(record), field_docs(record)
    found: dict[str, _Field] = {}
    for field in dataclasses.fields(record):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= _fields(kind, prefix=f"{name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        positional = bool(field.metadata.get("positional"))
        found[name] = _Field(kind, default, docs.get(field.name, ""), positional)
    return found


def _takes_presets(record: type) -> bool:
    """Return whether presets, which describe runs, make sense for a verb's record."""
    return issubclass(record, RunConfig)


def _split_option(argv: list[str], flag: str, wanted: str) -> tuple[list[str], list[str]]:
    """Split the arguments into the values given by ``flag`` and the rest, each in order."""
    found, rest = [], []
    words = iter(argv)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{flag} needs {wanted}.", where="command line")
            found.append(value)
        elif word.startswith(f"{flag}="):
            found.append(word.partition("=")[2])
        else:
            rest.append(word)
    return found, rest


def _underscored(word: str, fields: dict[str, _Field]) -> str:
    """Return `--dry-run` as `--dry_run`, where that is a flag."""
    flag, equals, value = word.partition("=")
    name = flag[2:].replace("-", "_")
    return f"--{name}{equals}{value}" if flag.startswith("--") and name in fields else word


def _gathered(words: list[str], fields: dict[str, _Field]) -> list[str]:
    """Return the words with those that stand alone gathered in the field that takes several.

    A verb that has such a field takes its words anywhere: between flags, after a switch. It also
    takes `--name a=1,b=2` for the fields below an open one, as lm-evaluation-harness does.
    """
    name = next((n for n, field in fields.items() if field.positional and field.several), None)
    if name is None:
        return words
    alone: list[str] = []
    flags: list[str] = []
    left = words[::-1]
    while left:
        word = left.pop()
        flag, equals, value = word.partition("=")
        field = fields.get(flag[2:])
        if not word.startswith("-"):
            alone.append(word)
            continue
        switch = field is not None and field.type is bool
        if word in ("-h", "--help") or equals or (switch and left[-1:] not in _SAID):
            flags.append(f"{word}=true" if switch and not equals else word)
            continue
        if not left:
            raise ConfigError(f"{flag} needs a value.", where="command line")
        value = left.pop()
        pairs = field is not None and field.open and "=" in value
        flags += _pairs(flag, value) if pairs else [f"{flag}={value}"]
    return [*flags, f"--{name}={json.dumps(alone)}"] if alone else flags


def _pairs(flag: str, value: str) -> list[str]:
    """Return `--flag a=1,b=2` as `--flag.a=1`, `--flag.b=2`."""
    pairs = (pair.partition("=") for pair in value.split(","))
    return [f"{flag}.{key.strip()}={text.strip()}" for key, _, text in pairs]


def _unknown_flags(flags: list[str], fields: dict[str, _Field], more: list[str]) -> list[str]:
    known = [f"--{n}" for n, field in fields.items() if field.several or not field.positional]
    known += ["--config", "--help", _PRINT, *more]
    faults = []
    for word in flags:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in known or _below_open(flag[2:], fields):
            continue
        faults.append(f"there is no flag `{flag}`.{_hint(flag, known, fields)}")
    return faults


def _hint(name: str, known: Iterable[str], fields: dict[str, _Field]) -> str:
    """Suggest a name; for `adaptor.r` too, where the names below the section are open."""
    if name in ("--dry_run", "--dry-run"):
        return " `tlora init --dry_run` tells what a run of the same flags takes."
    dashes, words = "--" if name.startswith("--") else "", name.split(".")
    below = [
        ".".join([f"{dashes}{section}", *words[depth:]])
        for section, field in fields.items()
        if field.open and len(words) > (depth := section.count(".") + 1)
    ]
    return did_you_mean(name, [*known, *below])


def _below_open(name: str, fields: dict[str, _Field]) -> bool:
    return any(field.open and name.startswith(f"{known}.") for known, field in fields.items())


def _unknown_keys(file: str, fields: dict[str, _Field]) -> list[str]:
    sections = {name.partition(".")[0] for name in fields}
    return [
        f"{file}: there is no field `{key}`.{_hint(key, [*fields, *sections], fields)}"
        for key in _keys(_filled(_read_yaml(file), fields), fields)
        if key not in fields and not _below_open(key, fields)
    ]


def _keys(values: dict[str, Any], fields: dict[str, _Field], prefix: str = "") -> list[str]:
    """Return the dotted names of the leaves; below an open field everything is a leaf."""
    found: list[str] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        section = any(known.startswith(f"{name}.") for known in fields)
        if isinstance(value, dict) and section:
            found += _keys(value, fields, prefix=f"{name}.")
        else:
            found.append(name)
    return found


def _filled(values: dict[str, Any], fields: dict[str, _Field], prefix: str = "") -> dict[str, Any]:
    """Return the values of a file without its empty sections: `data:` with nothing below it."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        section = any(known.startswith(f"{name}.") for known in fields)
        if value is None and (section or (name in fields and fields[name].open)):
            continue
        nested = section and isinstance(value, dict)
        found[key] = _filled(value, fields, prefix=f"{name}.") if nested else value
    return found


def _config_flag(file: str, fields: dict[str, _Field]) -> str:
    """Return the flag that lets jsonargparse read a file, or what the file says if that has to be
    given without its empty sections, which jsonargparse takes for values."""
    import yaml

    values = _read_yaml(file)
    filled = _filled(values, fields)
    return f"--config={file if filled == values else yaml.safe_dump(filled)}"


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).", "command line") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{file}: not YAML ({cause}).", where="command line") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: give `field: value` lines.", where="command line")
    return values


def _build(record: Any, values: Any) -> Any:
    hints = typing.get_type_hints(record)
    given = {}
    for field in dataclasses.fields(record):
        kind, value = hints[field.name], values[field.name]
        given[field.name] = _build(kind, value) if dataclasses.is_dataclass(kind) else value
    return record(**given)


def _add_options(values: Any, files: list[str], parser: _Parser) -> None:
    """Lay the open fields of the files over one another name by name.

    jsonargparse takes the last file's `adapter` or `trainer` for the whole field.
    """
    if len(files) < 2:
        return
    layers = [parser.parse_args([_config_flag(file, parser.fields)]) for file in files]
    for name in (name for name, field in parser.fields.items() if field.open):
        below: dict[str, Any] = {}
        for layer in layers:
            below |= layer[name]
        values[name] = below | values[name]


def _options(files: list[str]) -> set[str]:
    """Return the names of the method's options that the files give."""
    return {name for file in files for name in _read_yaml(file).get("adapter") or ()}


def _fitting(values: Any, preset: set[str]) -> dict[str, Any]:
    """Return the method's options without those that only a preset gives and the method lacks.

    As in a comparison, so that `--preset NAME --method OTHER` is one command. What the user gave is
    left for the method to judge.
    """
    known = {field.name for field in dataclasses.fields(METHODS.load(values["method"]).options)}
    return {k: v for k, v in values["adapter"].items() if k in known or k not in preset}


def _plain(message: str, fields: dict[str, _Field]) -> str:
    """Return jsonargparse's message as one sentence in our words, or at least in one line."""
    line = " ".join(message.split())
    key = re.search(r'Parser key "([^"]+)"', line)
    value = re.search(r"(?:Got|Given) value: (.*)$", line)
    if key and value and key[1] in fields:
        return f"`{key[1]}` is {value[1]!r}; give {_wanted(fields[key[1]].type)}."
    return line


def _wanted(kind: Any) -> str:
    """Say in words what values a field takes."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if kind in words:
        return words[kind]
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    if typing.get_origin(kind) is list:
        return "a list like [a, b]"
    if typing.get_origin(kind) is dict:
        return "`name: value` pairs"
    return " or ".join(_wanted(part) for part in typing.get_args(kind) if part is not type(None))


def to_yaml(record: Any) -> str:
    """Return a record as YAML that `--config` reads back into the same record."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(record), sort_keys=False, allow_unicode=True)
