"""Flags and YAML -> a record; precedence: flags, files, presets, defaults.

A record is a dataclass; each field is a flag. A nested record gives dotted flags
(`--data.max_length`); a dict field accepts any name below it (`--trainer.learning_rate`), which is
checked later. The record checks its values (`checks`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from tlora import presets
from tlora.checks import Section, default_of, hints, is_section, takes
from tlora.errors import ConfigError, did_you_mean
from tlora.flags import Field, fields_of
from tlora.registry import METHODS
from tlora.shortnames import contradiction, short_names, written_out
from tlora.training.argumentfields import declared_fields
from tlora.training.kinds import KINDS
from tlora.training.runconfig import RunConfig
from tlora.yamlfiles import read_value, read_yaml

_NULL = ("null", "~")
_SWITCH = ("true", "false", "yes", "no", "on", "off")
AnyRecord = TypeVar("AnyRecord", bound=Section)


@dataclasses.dataclass(frozen=True)
class Parsed(Generic[AnyRecord]):
    """The parsed command line."""

    record: AnyRecord
    print_config: bool
    """Show the record instead of running."""
    note: str = ""
    """The settings of the default preset, in a sentence for the user; "" if it sets nothing."""


def parse(prog: str, record: type[AnyRecord], argv: list[str]) -> Parsed[AnyRecord]:
    """Read ``argv`` into a ``record``; flags override files override presets, in any position.

    A first word that ends in .yaml is a file too: `tlora compare compare.yaml`. A run without a
    preset uses the default one (`tlora.presets`).

    Args:
        prog: the command line up to here.
        record: the dataclass to fill.
        argv: the words after the verb.

    Raises:
        ConfigError: a flag or a key of a file is unknown, or the record refuses a value.
    """
    fields = dict(fields_of(record))
    lists: dict[str, list[str]] = {"config": []}
    if issubclass(record, RunConfig):
        lists["preset"] = []
    words = [word for word in argv if word not in ("--print_config", "--print-config")]
    print_config = len(words) < len(argv)
    if words and words[0].endswith((".yaml", ".yml")) and not words[0].startswith("-"):
        lists["config"].append(words.pop(0))
    flags: list[tuple[str, Any]] = []
    shorts = short_names(record)
    known = _as_fields(shorts, fields) | fields
    faults = list(_read_words(record, words, known, lists, flags))
    flags, contradictions = _full_names(flags, shorts)
    faults += contradictions
    below = [values for name in lists.get("preset", []) for values in presets.layers(name)]
    files = []
    for name in lists["config"]:
        values, contradictions = written_out(read_yaml(name), shorts)
        files.append(values)
        misplaced = values.keys() - {*record.field_names()}
        elsewhere = [*shorts, *fields, *_trained_with(record)] if misplaced else []
        unknown = _unknown_keys(record, values, elsewhere)
        faults += [f"{name}: {fault}" for fault in unknown + contradictions]
    if faults:
        raise ConfigError(faults, where="command line")
    given: dict[str, Any] = copy.deepcopy(functools.reduce(_over, files, {}))
    for name, value in flags:
        _set(given, name, value)
    defaults = {} if below or "preset" not in lists else _defaults(given)
    preset = functools.reduce(_over, below, {"adapter": defaults} if defaults else {})
    values = _over(_fitting(preset, given.get("method")), given)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            said = f"`{name}` is missing; `{prog}` needs {_with_article(field.help)}"
            raise ConfigError(said, where="command line")
    return Parsed(record.from_dict(values), print_config, _note(defaults))


def _with_article(text: str) -> str:
    text = f"{text[0].lower()}{text[1:]}"
    return text if text.startswith(("a ", "an ", "the ")) else f"the {text}"


def _as_fields(shorts: dict[str, str], fields: dict[str, Field]) -> dict[str, Field]:
    """Return the short names as flags that accept any value, like the names below an open field."""
    return {name: Field(Any, None, "", False) for name in shorts if name not in fields}


def _full_names(
    flags: list[tuple[str, Any]], shorts: dict[str, str]
) -> tuple[list[tuple[str, Any]], list[str]]:
    """Return flags under their full names, and a sentence for each contradiction."""
    given = dict(flags)
    faults = []
    for short in (name for name in shorts if name in given):
        full = shorts[short]
        faults += contradiction(short, given[short], full, given.get(full, given[short]))
    return [(shorts.get(name, name), value) for name, value in flags], faults


def _read_words(
    record: type[Section],
    words: list[str],
    fields: dict[str, Field],
    lists: dict[str, list[str]],
    flags: list[tuple[str, Any]],
) -> Iterator[str]:
    """Put the values of flags into ``flags`` and ``lists``; yield faults of the words."""
    places = [name for name, field in fields.items() if field.positional]
    many = any(fields[name].item for name in places)
    found: list[str] = []
    advice = "give flags as --name value" + ", and files as a.yaml" * (not places)
    left = words[::-1]
    while left:
        word = left.pop()
        if not word.startswith("-") or word == "-":
            if many or len(found) < len(places):
                found.append(word)
            else:
                yield f"unexpected word {word!r}; {advice}."
            continue
        flag, equals, text = word.partition("=")
        name = flag[2:] if _takes(flag[2:], fields) else flag[2:].replace("-", "_")
        known = _takes(name, fields) or name in lists
        switch = name in fields and fields[name].kind is bool
        if switch and not equals and (not left or left[-1].lower() not in _SWITCH):
            text = "true"
        elif not equals and left and not left[-1].startswith("--"):
            text = left.pop()
        elif not equals and known:
            yield f"{flag} needs a value."
            continue
        if name in lists:
            lists[name].append(text)
        elif known:
            flags.append((name, _read(fields, name, text)))
        else:
            names = [*fields, *lists, "help", "print_config", *_trained_with(record)]
            names = [f"--{each}" for each in names]
            yield f"there is no flag `{flag}`.{_hint(flag, names, fields)}"
    flags += zip(places, [found] if many and found else found, strict=False)


def _takes(name: str, fields: dict[str, Field]) -> bool:
    return name in fields or any(f.open and name.startswith(f"{n}.") for n, f in fields.items())


def _trained_with(record: type[Section]) -> list[str]:
    """Return the names below `adapter` and `trainer` in a run with the defaults."""
    if not issubclass(record, RunConfig):
        return []
    options = [field.name for field in dataclasses.fields(METHODS.load(RunConfig.method).options)]
    trainer = declared_fields(KINDS["causal"].arguments)
    return [*(f"adapter.{each}" for each in options), *(f"trainer.{each}" for each in trainer)]


def _hint(name: str, known: list[str], fields: dict[str, Field]) -> str:
    """Suggest a name; also for `adaptor.r`, where names below the section are open."""
    if name in ("--dry_run", "--dry-run"):
        return " `tlora init --dry_run` shows what a run of the same flags takes."
    if name == "--resume":
        return " Rerun the same command to continue: no flag is needed."
    dashes, words = "--" if name.startswith("--") else "", name.split(".")
    own = f"{words[0].removeprefix(dashes)}."
    known_section = any(each.startswith(own) for each in fields)
    below = [
        ".".join([f"{dashes}{section}", *words[depth:]])
        for section, field in fields.items()
        if field.open and len(words) > (depth := section.count(".") + 1)
        if section.startswith(own) or not known_section
    ]
    return did_you_mean(name, [*known, *below])


def _unknown_keys(
    record: type[Section], values: dict[str, Any], elsewhere: Sequence[str] = ()
) -> list[str]:
    """Return a sentence for each key of a file that is not a field; may suggest ``elsewhere``."""
    faults = record.name_faults(values, elsewhere)
    for name, kind in hints(record).items():
        if is_section(kind) and isinstance(values.get(name), dict):
            faults += _unknown_keys(kind, values[name])
    return faults


def _read(fields: dict[str, Field], name: str, text: str) -> Any:
    """Return the value that a flag's text represents."""
    if name not in fields:  # below an open field
        return _fitted(Any, text)
    kind = fields[name].kind
    if fields[name].open:
        value = read_value(text)
        if isinstance(value, dict) or "=" not in text:
            return value
        pairs = (pair.partition("=") for pair in text.split(","))
        return {key.strip(): read_value(word.strip()) for key, _, word in pairs}
    if fields[name].item and text not in _NULL and not text.startswith("["):
        return [_fitted(fields[name].item, word.strip()) for word in text.split(",")]
    return _fitted(kind, text)


def _fitted(kind: Any, text: str) -> Any:
    """Return the text unchanged if only text is valid, otherwise parse it as YAML."""
    value = None if text in _NULL else read_value(text)
    if isinstance(value, str) or (value is None and text not in _NULL):
        return text
    # `--output_dir 5` is a name; `--validation 5` is a number.
    return text if not takes(kind, value) and takes(kind, text) else value


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = values = inner if isinstance(inner, dict) else {}
    old = values.get(last)
    both = not sections and isinstance(old, dict) and isinstance(value, dict)
    values[last] = old | value if both else value


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge values over others, section by section; an empty section removes nothing."""
    laid = below | above
    for name, old in below.items():
        if isinstance(old, dict) and isinstance(new := above.get(name), dict | None):
            laid[name] = old | (new or {})
    return laid


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the default preset that ``given``, files and flags, leave open.

    None if the options come from an existing run or adapter.
    """
    if given.get("resume") or given.get("continue_from"):
        return {}
    options = presets.default_options(given.get("method", RunConfig.method))
    own = given.get("adapter")
    return {n: v for n, v in options.items() if not isinstance(own, dict) or n not in own}


def _note(defaults: dict[str, Any]) -> str:
    """Name the default preset and the options that it changes from the method's own defaults."""
    own = METHODS.load(RunConfig.method).options.__dataclass_fields__ if defaults else {}
    changed = [
        name.removeprefix("allocate_")
        for name, value in defaults.items()
        if value != default_of(own[name])
    ]
    if not changed:
        return ""
    return (
        f"Preset: {presets.DEFAULT} (every layer gets the same {' and '.join(changed)})."
        " For the paper's setting, give --preset paper-rule."
    )


def _fitting(preset: dict[str, Any], chosen: str | None) -> dict[str, Any]:
    """Return the preset without options that the method lacks, as in a comparison.

    So `--preset NAME --method OTHER` is one command. The method checks the user's own options.
    """
    if "adapter" not in preset:
        return preset
    method = chosen or preset.get("method", RunConfig.method)
    known = {field.name for field in dataclasses.fields(METHODS.load(method).options)}
    return preset | {"adapter": {k: v for k, v in preset["adapter"].items() if k in known}}
