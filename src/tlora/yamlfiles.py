"""Reads and writes YAML in which `1e-4` is a number and a date is text."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tlora.errors import ConfigError

_FLOAT = "tag:yaml.org,2002:float"
_SCIENTIFIC = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""`1e-4`, a number in YAML 1.2; YAML 1.1, and with it PyYAML, reads it as text."""


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a file of `field: value` lines, in which `1e-4` is a number.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = _loaded(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).", "command line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not text in UTF-8; save it as such.", "command line") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not YAML ({error}).", where="command line") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{file}: give `field: value` lines.", where="command line")
    return values or {}


def read_value(text: str) -> Any:
    """Read one value as YAML; invalid YAML is text."""
    try:
        if re.fullmatch(r"[-+]?[0-9]+", text):
            return int(text)  # YAML 1.1 takes leading zeros for octal digits
        return _loaded(text)
    except ValueError:
        return text


def _loaded(text: str) -> Any:
    """Return the YAML value of a text.

    Raises:
        ValueError: it is not YAML; the message is one line.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from error
    # A value that does not match its tag (`!!int x`) raises Python's own errors.
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def to_yaml(record: Any, left_out: Collection[str] = ()) -> str:
    """Return a record as YAML that `--config` reads back into the same record.

    Args:
        record: a dataclass.
        left_out: fields that have their default.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that `read_yaml` would read as a number."""

    Dumper.add_implicit_resolver(_FLOAT, _SCIENTIFIC, None)
    values = {k: v for k, v in dataclasses.asdict(record).items() if k not in left_out}
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads `1e-4` as a number and a date as text.

        An alias may not occur in its own value, nor a key twice in a mapping.

        Sets, pairs and bytes are refused: no field holds them, and JSON cannot.
        """

        def construct_document(self, node: Any) -> Any:
            self.deep_construct = True
            return super().construct_document(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [(key.tag, key.value) for key, _ in node.value]
            for (key, _), said in zip(node.value, keys, strict=True):
                if keys.count(said) > 1 and isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(
                        problem=f"`{key.value}` is given twice", problem_mark=key.start_mark
                    )
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(_FLOAT, _SCIENTIFIC, None)
    as_text: Any = Loader.construct_yaml_str
    Loader.add_constructor("tag:yaml.org,2002:timestamp", as_text)
    refuse: Any = Loader.construct_undefined
    for kind in ("binary", "omap", "pairs", "set"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", refuse)
    return Loader
