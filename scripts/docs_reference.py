"""The pages of the site that are written from the code: verbs, options, the Python interface."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import tlora
from tlora.checks import choices, words
from tlora.cli import VERBS, Verb
from tlora.flags import Field, fields_of, help_of
from tlora.presets import default_options
from tlora.registry import METHODS
from tlora.shortnames import SHORT, short_names
from tlora.training.runconfig import RunConfig

_SECTIONS = {
    "": "Fields",
    "data": "Rows and columns: `data`",
    "calibration": "Calibration rows: `calibration`",
    "tokens": "Added tokens: `tokens`",
    "judge": "The judge: `judge`",
}
_FOLDERS = ("training/runfolder", "compare/comparefolder", "evaluate/evalfolder")
_CLASS = "    options: {heading_level: 3}\n"
_LINALG = ("moments", "subspace", "allocation")


def pages() -> dict[str, str]:
    """Return the Markdown of each generated page by its place in the site."""
    made = {f"reference/cli/{verb.name}.md": _verb(verb) for verb in VERBS.values()}
    made["reference/options.md"] = _options()
    made["reference/folders.md"] = _folders()
    made["reference/python.md"] = _python()
    made["reference/errors.md"] = (
        "# Errors in Python\n\nEvery error that tlora raises on purpose is a `TLoraError`.\n\n"
        "::: tlora.errors\n"
        "    options: {show_root_heading: false, show_root_toc_entry: false}\n"
    )
    return made


def _verb(verb: Verb) -> str:
    """Return the page of a verb: what it does, its help and every field."""
    summary = (verb.record.__doc__ or "").split("\n\n")[0]
    needs = f'Needs `pip install ".[{verb.extra}]"`. ' if verb.extra else ""
    lines = [f"# tlora {verb.name}", "", " ".join(summary.split()), ""]
    lines += [f"{needs}Every field is a flag, and a key of the YAML that `--config` names.", ""]
    shown = help_of(f"tlora {verb.name}", verb.record, [])
    lines += ["```text", f"$ tlora {verb.name} --help", shown, "```", ""]
    if shorts := short_names(verb.record):
        lines += ["## Short names", ""]
        for short, full in shorts.items():
            lines += [f"`--{short}` (`{full}`)", f":   {_text(SHORT[short][1])}", ""]
    sections: dict[str, list[tuple[str, Field]]] = {}
    for name, field in fields_of(verb.record):
        sections.setdefault(name.rpartition(".")[0], []).append((name, field))
    for section, members in sections.items():
        lines += [f"## {_SECTIONS.get(section, f'`{section}`')}", ""]
        for name, field in members:
            lines += _entry(name if field.positional else f"--{name}", field)
    if issubclass(verb.record, RunConfig):
        lines += [
            "`--adapter.NAME` takes the [options of the method](../options.md), `--trainer.NAME`"
            " the training arguments of transformers and TRL under their own names.",
            "",
        ]
    return "\n".join(lines)


def _options() -> str:
    """Return the page of the options of every method."""
    lines = ["# Options of the methods", ""]
    lines += [
        "Flags `--adapter.NAME`, keys below `adapter` in a YAML, and fields of the method's options"
        " in Python; those of `tlora` are `TLoraConfig`. The defaults are those of `tlora train`"
        " without a preset.",
        "",
    ]
    shared: dict[str, Field] = {}
    for method in METHODS.names():
        given = default_options(method)
        lines += [f"## {method}", ""]
        same = []
        for name, declared in fields_of(METHODS.load(method).options):
            field = dataclasses.replace(declared, default=given.get(name, declared.default))
            if shared.setdefault(name, field) == field and method != METHODS.names()[0]:
                same.append(f"`{name}`")
            else:
                lines += _entry(name, field)
        if same:
            lines += [f"As above: {', '.join(same)}.", ""]
    return "\n".join(lines)


def _folders() -> str:
    """Return the page of what verbs leave on disk: the docstrings of the modules that write it."""
    texts = ["# Folders on disk"]
    for name in _FOLDERS:
        source = (Path(tlora.__file__).parent / f"{name}.py").read_text("utf-8")
        head, _, rest = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n::\n")
        title = re.split(r"[.:,]", head)[0]
        texts.append(f"## {title}\n\n{head}\n{rest}")
    return "\n\n".join(texts)


def _python() -> str:
    """Return the page of the Python interface: the public names, then the mathematics."""
    lines = ["# Python", "", "All public names are imported from `tlora`.", ""]
    for name, home in tlora._HOME.items():
        if home != "tlora.errors":  # which has a page
            lines += [f"::: {home}.{name}", ""]
    lines += ["## Mathematics", "", "Pure functions of tensors, which need torch alone.", ""]
    for module in _LINALG:
        lines += [f"::: tlora.linalg.{module}", _CLASS]
    return "\n".join(lines)


def _entry(name: str, field: Field) -> list[str]:
    """Return a term with the default, and the help of the field."""
    return [f"`{name}`", f":   {_text(field.help)} {_value(field)}", ""]


def _value(field: Field) -> str:
    """Say what the field takes and what it is by default."""
    options = choices(field.kind)
    takes = ", ".join(f"`{option}`" for option in options) or _text(words(field.kind))
    if field.default is dataclasses.MISSING:
        return f"*Takes {takes}; required.*"
    default: Any = {None: "none", "": "empty"}.get(field.default) if _plain(field.default) else None
    shown = default or f"`{field.default}`"
    return f"*Takes {takes}; default {shown}.*"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _text(text: str) -> str:
    """Escape what Markdown would read in a help text, outside of its code."""
    return "".join(_escaped(part) for part in re.split(r"(`[^`]*`|https?://\S+)", text))


def _escaped(part: str) -> str:
    if part.startswith("`"):
        return part
    if part.startswith("http"):
        return f"<{part.rstrip('.')}>{'.' if part.endswith('.') else ''}"
    return re.sub(r"([*_<>\[\]{}|\\])", r"\\\1", part)
