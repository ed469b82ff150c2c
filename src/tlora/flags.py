"""The flags of a verb: the fields of its record, and their help, which stands below each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from tlora.checks import Section, choices, default_of, hints, is_section, item_of
from tlora.training.runconfig import RunConfig

_WIDTH = 88
_PRESET_HELP = (
    "A whole run by name, below files and flags; see `tlora list presets`. With another --method,"
    " only those of its `adapter` options apply that the method has."
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One flag: a field of the record, or of a record inside it."""

    kind: Any
    default: Any
    help: str
    positional: bool
    """Whether words that stand alone are its value."""

    @property
    def open(self) -> bool:
        """Whether any name may stand below it."""
        return typing.get_origin(self.kind) is dict

    @property
    def item(self) -> Any:
        """The type of what it lists, if it takes a list."""
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
    """Return the text written below each field of a dataclass, inherited ones too, a line each."""
    docs: dict[str, str] = {}
    for base in record.__bases__:
        if dataclasses.is_dataclass(base):
            docs |= field_docs(base)
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


def help_text(prog: str, record: type[Section]) -> str:
    """Return the help of one verb: its words, what it does and its flags."""
    fields = dict(fields_of(record))
    positional = {name: field for name, field in fields.items() if field.positional}
    words = ["[run.yaml]"]
    for name, field in positional.items():
        word = name if field.default is dataclasses.MISSING else f"[{name}]"
        words = [*words, f"[{name} ...]"] if field.item else [word]
    lines = [f"usage: {prog} {' '.join(words)} [flags]", ""]
    lines += [*textwrap.wrap((record.__doc__ or "").split("\n\n")[0], _WIDTH), ""]
    lines += [line for name, field in positional.items() for line in _entry(name, field)]
    lines.append("flags:")
    lines += _lines("--config FILE", "YAML of the fields below, or the first word; flags win.")
    if issubclass(record, RunConfig):
        lines += _lines("--preset NAME", _PRESET_HELP)
    lines += _lines("--print_config", "Show the resolved configuration instead of running.")
    lines += _lines("-h, --help", "Show this help.")
    return "\n".join([*lines, flags_help(record)])


def flags_help(record: type, prefix: str = "") -> str:
    """Return what each field of a record is as a flag, with its default."""
    fields = dict(fields_of(record, prefix)).items()
    shown = [_entry(f"--{name}", field) for name, field in fields if not field.positional]
    return "\n".join(line for lines in shown for line in lines)


def _entry(name: str, field: Field) -> list[str]:
    shown = field.default or type(field.default) in (int, float)
    known = shown and field.default is not dataclasses.MISSING
    default = f" (default: {field.default})" if known else ""
    return _lines(f"{name} {'|'.join(choices(field.kind))}".rstrip(), f"{field.help}{default}")


def _lines(head: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {head}", *wrapped]
