"""The flags of a verb: the fields of its record, with the help that is written below each."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from tlora.checks import Section, choices, default_of, hints, is_section, item_of
from tlora.presets import DEFAULT, default_options
from tlora.registry import METHODS
from tlora.shortnames import SHORT, short_names
from tlora.training.runconfig import RunConfig

_WIDTH = 88
_LONG = 130
"""Characters; the first screen cuts longer help at its first colon."""
_PRESET_HELP = (
    "A setting or a whole run by name, below files and flags; see `tlora "
    f"list presets`. By default the method's preset `{DEFAULT}`, if it has "
    "one. With another --method, only the preset's `adapter` options that "
    "this method has apply."
)
_GROUPS = {
    "data": ("rows and columns", "--data.prompt_column question"),
    "adapter": ("options of the method", "--adapter.target_modules q_proj,v_proj"),
    "calibration": ("rows that the method calibrates on", "--calibration.samples 64"),
    "tokens": ("tokens to add", "--tokens.add '<a>,<b>'"),
    "trainer": ("training arguments", "--trainer.lr_scheduler_type cosine"),
    "judge": ("the judge of conversations", "--judge.model gpt-4"),
}
"""The topic of a section's flags, and an example."""
_COMMON = (
    *("model", "task", "train_file", "eval_file", "data.dataset", "data.format", "data.val_size"),
    *("output_dir", "method", "methods", "continue_from", "quantization", "preset", "config"),
    *("learning_rate", "learning_rates", "epochs", "max_steps", "batch_size", "r", "alpha"),
    "adapter.target_modules",
    *("early_stopping", "data.max_length", "test_file", "validation", "metric", "jobs"),
    *("seed", "resume", "dry_run", "print_config"),
)
"""The most common fields, in the order of the help."""
_CONFIG = (
    "A YAML file with any of these fields; it can also be the first word after the verb. Flags"
    " override it."
)
_OWN_FLAGS = {
    "config": _CONFIG,
    "adapter.target_modules": "Modules to adapt: names, a regex, or all-linear, the default.",
    "print_config": "Show the resolved configuration instead of running.",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One flag: a field of the record, or of a nested record."""

    kind: Any
    default: Any
    help: str
    positional: bool
    """Whether standalone words are its value."""

    @property
    def open(self) -> bool:
        """Whether any name may follow it."""
        return typing.get_origin(self.kind) is dict

    @property
    def item(self) -> Any:
        """The item type of its list, if it takes a list."""
        return item_of(self.kind)


def fields_of(record: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Yield each flag of a record with its name; the fields of an inner record are dotted."""
    docs = field_docs(record)
    for field in dataclasses.fields(record):
        kind = hints(record)[field.name]
        if is_section(kind):
            yield from fields_of(kind, f"{prefix}{field.name}.")
        else:
            positional = bool(field.metadata.get("positional"))
            made = Field(kind, default_of(field), docs.get(field.name, ""), positional)
            yield f"{prefix}{field.name}", made


def field_docs(record: type) -> dict[str, str]:
    """Return the one-line help below each field of a dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for base in record.__bases__:
        if dataclasses.is_dataclass(base):
            docs |= field_docs(base)
    # A record made from another library's carries its help with it.
    carried = {
        f.name: f.metadata["help"] for f in dataclasses.fields(record) if "help" in f.metadata
    }
    if carried:
        return docs | carried
    tree = ast.parse(textwrap.dedent(inspect.getsource(record)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs


def help_of(prog: str, record: type[Section], argv: list[str]) -> str:
    """Return the help of a verb: one screen, or with `--help all` every flag.

    It shows the options of the method named in ``argv``, or of the default method.
    """
    name = getattr(record, "method", None)
    for word, following in itertools.pairwise([*argv, ""]):
        if word.startswith("--method"):
            name = word.partition("=")[2] or following
    method = str(name) if issubclass(record, RunConfig) else None
    short = None if "all" in argv else screen(prog, record, method)
    return help_text(prog, record, method) if short is None else short


def help_text(prog: str, record: type[Section], method: str | None = None) -> str:
    """Return the whole help of one verb: usage, purpose, and flags in groups.

    Args:
        prog: the command line up to here.
        record: the verb's record.
        method: the name of the method to describe, if the verb runs one.
    """
    fields = dict(fields_of(record))
    lines = _head(prog, record)
    positional = {name: field for name, field in fields.items() if field.positional}
    lines += [line for name, field in positional.items() for line in _entry(name, field)]
    lines.append("flags:")
    lines += _lines("--config FILE", _CONFIG)
    if issubclass(record, RunConfig):
        lines += _lines("--preset NAME", _PRESET_HELP)
    lines += _lines("--print_config", "Show the resolved configuration instead of running.")
    lines += _lines("-h, --help", "Show the most common flags; `--help all` shows every flag.")
    for short, text in _short_texts(record, method).items():
        lines += _lines(f"--{short}", f"{text} Short for --{SHORT[short][0]}.")
    groups: dict[str, list[tuple[str, Field]]] = {"": []}
    for name, field in fields.items():
        group = name.rpartition(".")[0] or ("trainer" if name == "trainer" else "")
        if not field.positional and not (name == "adapter" and method):
            groups.setdefault(group, []).append((name, field))
    if method:
        groups["adapter"] = list(_options_of(method))
    for group in sorted(groups, key=_place):
        members = groups[group]
        if group:
            about, example = _GROUPS.get(group, (group, f"--{members[0][0]} ..."))
            lines += ["", f"{about}, for example {example}:"]
        lines += [line for name, field in members for line in _entry(f"--{name}", field)]
    return "\n".join(lines)


def _options_of(method: str) -> Iterator[tuple[str, Field]]:
    """Yield the flags of a method's options, with the defaults of a run without a preset."""
    given = default_options(method)
    for name, field in fields_of(METHODS.load(method).options):
        default = given.get(name, field.default)
        yield f"adapter.{name}", dataclasses.replace(field, default=default)


def _short_texts(record: type[Section], method: str | None) -> dict[str, str]:
    """Return the help of each short name, with the method's defaults and without what it lacks."""
    texts = {name: SHORT[name][1] for name in short_names(record)}
    if method is None:
        return texts
    found = METHODS.load(method)
    options = dict(fields_of(found.options, "adapter."))  # no preset sets one with a short name
    known = {"learning_rate": found.traits.learning_rates.words()}
    for name in (name for name in texts if SHORT[name][0].startswith("adapter.")):
        option = options.get(SHORT[name][0])
        known[name] = "" if option is None else str(option.default)
        if option is not None and "sqrt(" in option.help:
            texts[name] = texts[name].replace("alpha / r", "alpha / sqrt(r)")
    for name, default in known.items():
        texts[name] = f"{texts[name].partition(';')[0]} (default: {default})."
    return {name: text for name, text in texts.items() if known.get(name) != ""}


def _place(group: str) -> int:
    known = ["", *_GROUPS]
    return known.index(group) if group in known else len(known)


def screen(prog: str, record: type[Section], method: str | None = None) -> str | None:
    """Return the one-screen help with the most common flags; None if everything fits."""
    fields = dict(fields_of(record))
    shorts = _short_texts(record, method)
    if "learning_rate" in shorts:
        shorts["learning_rate"] = SHORT["learning_rate"][1]  # a line
    if not any("." in full for full in short_names(record).values()):
        return None
    texts = {name: _first_sentence(field) for name, field in fields.items()} | shorts | _OWN_FLAGS
    if issubclass(record, RunConfig):
        texts["preset"] = f"A setting by name; see `tlora list presets` (default: {DEFAULT})."
    width = max(map(len, _COMMON)) + 4
    lines = _head(prog, record)
    for name in (name for name in _COMMON if name in texts):
        indent = " " * (width + 2)
        text = f"  {f'--{name}':<{width}}{texts[name]}"
        lines += textwrap.wrap(text, 100, subsequent_indent=indent)
    return "\n".join([*lines, "", f"`{prog} --help all` shows every flag, in groups."])


def _first_sentence(field: Field) -> str:
    text = re.split(r"(?<=[.;]) (?!see )", field.help, maxsplit=1)[0].rstrip(".;")
    if len(text) > _LONG:
        text = text.partition(":")[0]
    shown = field.default not in (dataclasses.MISSING, None, False, "")
    simple = isinstance(field.default, (int, float, str))
    return f"{text}{f' (default: {field.default})' if shown and simple else ''}."


def _head(prog: str, record: type[Section]) -> list[str]:
    """Return the usage lines and a description of the verb."""
    words = []
    for name, field in fields_of(record):
        if field.positional:
            word = name if field.default is dataclasses.MISSING else f"[{name}]"
            words += ["[run.yaml]", f"[{name} ...]"] if field.item else [word]
    lines = [f"usage: {prog} {' '.join(words or ['[run.yaml]'])} [flags]", ""]
    return [*lines, *textwrap.wrap((record.__doc__ or "").split("\n\n")[0], _WIDTH), ""]


def _entry(name: str, field: Field) -> list[str]:
    shown = field.default or type(field.default) in (int, float)
    known = shown and field.default is not dataclasses.MISSING
    default = f" (default: {field.default})" if known else ""
    return _lines(f"{name} {'|'.join(choices(field.kind))}".rstrip(), f"{field.help}{default}")


def _lines(head: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_long_words=False,  # links
        break_on_hyphens=False,
    )
    return [f"  {head}", *wrapped]
