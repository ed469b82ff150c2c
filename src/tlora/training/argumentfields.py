"""The fields and types of a training-arguments class, without importing the class.

Importing transformers or TRL takes seconds, and a misspelled field should be refused at once. So
the fields are read from the source of the installed package: the annotated names of the class and
its base classes, found by following the imports of its module.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib.util
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlora.models.pretrained import load_class


def declared_fields(target: str) -> dict[str, Any]:
    """Return the type of each field of the dataclass ``target``, by name.

    Types of other libraries, which are not imported, become empty classes.

    Args:
        target: the class as "module:name".
    """
    package, _, name = target.partition(":")
    if package not in sys.modules:
        try:
            return dict(_parsed(package, name))
        except (OSError, SyntaxError, LookupError):
            pass  # no readable source, only compiled files
    fields = dataclasses.fields(load_class(target))
    return {field.name: field.type for field in fields if field.init}


@functools.cache
def _parsed(package: str, name: str) -> dict[str, Any]:
    """Return the fields of a class that can be imported from ``package``.

    Raises:
        OSError, SyntaxError, LookupError: the source is missing, or does not show the class.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise LookupError(package)
    return _fields(Path(spec.origin), name)


def _fields(module: Path, name: str) -> dict[str, Any]:
    """Return the fields of the class ``name`` that ``module`` defines or imports."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            inherited: dict[str, Any] = {}
            for base in node.bases:
                inherited |= _fields(module, ast.unparse(base))
            return inherited | _own(node)
    for line in ast.walk(tree):
        if isinstance(line, ast.ImportFrom):
            known = {alias.asname or alias.name: alias.name for alias in line.names}
            if name in known:
                return _fields(_imported(module, line), known[name])
    raise LookupError(f"{name} in {module}")


def _imported(module: Path, node: ast.ImportFrom) -> Path:
    """Return the file of the module that an import in ``module`` names."""
    if node.level:
        place = module.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    # Only for a package itself: finding a module inside one would import the package.
    spec = importlib.util.find_spec(str(node.module)) if "." not in str(node.module) else None
    if spec is None or not spec.origin:
        raise LookupError(node.module)
    return Path(spec.origin)


def _own(node: ast.ClassDef) -> dict[str, Any]:
    return {
        line.target.id: _type_of(line.annotation)
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and not _is_set_later(line.value)
    }


def _is_set_later(value: ast.expr | None) -> bool:
    """Whether a field is excluded from the constructor, `field(init=False)`."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(
        word.arg == "init" and isinstance(word.value, ast.Constant) and not word.value.value
        for word in keywords
    )


def _type_of(annotation: ast.expr) -> Any:
    text = ast.unparse(annotation)
    try:
        return eval(text, {"__builtins__": {}}, _Names())
    except (AttributeError, TypeError):
        return type(text, (), {})


class _Names(Mapping[str, Any]):
    """Names that an annotation may use: builtins, `typing`, and an empty class for others."""

    def __getitem__(self, name: str) -> Any:
        known = getattr(typing, name, getattr(builtins, name, None))
        return type(name, (), {}) if known is None else known

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
