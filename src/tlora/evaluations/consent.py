"""Find code in an evaluation's YAML before lm-evaluation-harness reads it.

Its loader imports the Python file that a `!function` names while it reads the YAML, and Hugging
Face's `evaluate` downloads and runs a metric that the harness does not know. `datasets` before 5
reads pickles. Templates run in Jinja's sandbox, where they cannot execute code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tlora.errors import DataError

BAD_VALUES = (ValueError, LookupError, AttributeError)
"""What PyYAML raises over a value that its tag does not fit: `!!bool x`, `!!timestamp x`."""


class _Code(str):
    """The value of a `!function` tag."""

    __slots__ = ()


def code_in(path: str | Path) -> list[str]:
    """Describe everything that would run code in a YAML and its includes.

    Args:
        path: YAML file of a task or group.

    Raises:
        DataError: a file cannot be read, is not YAML, or has tags unknown to the harness.
    """
    import yaml

    found: list[str] = []
    waiting, seen = [Path(path)], set()
    while waiting:
        file = waiting.pop()
        try:
            file = file.expanduser().resolve()
            if file in seen:
                continue
            seen.add(file)
            values, functions = _read(file)
        except (OSError, RuntimeError, *BAD_VALUES, yaml.YAMLError) as error:
            cause = " ".join(str(error).split())[:300]
            raise DataError(
                f"{file}: not the YAML of an evaluation ({cause}); fix the file."
            ) from error
        found += [f"`!function {name}` in {file}" for name in functions]
        found += [f"{what} in {file}" for what in _foreign(values)]
        included = values.get("include", []) if isinstance(values, dict) else []
        names = included if isinstance(included, list) else [included]
        waiting += [file.parent / str(name) for name in names]
    return list(dict.fromkeys(found))


def sandbox_templates() -> None:
    """Make lm-evaluation-harness render templates in Jinja's sandbox.

    In a plain environment, `{{ x.__init__.__globals__ }}` leads to every module.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _read(file: Path) -> tuple[Any, list[str]]:
    """Return the contents of a YAML and the names of its functions, without importing any."""
    import yaml

    functions: list[str] = []

    class Loader(yaml.SafeLoader):
        """Records functions, including those of duplicate keys."""

    def note(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Code:
        functions.append(str(loader.construct_scalar(node)))
        return _Code(functions[-1])

    Loader.add_constructor("!function", note)
    return yaml.load(file.read_bytes(), Loader), functions


def _foreign(values: Any) -> Iterator[str]:
    """Yield metrics from `evaluate` and pickled data sets, at any depth."""
    from lm_eval.api import metrics  # noqa: F401  (registers them)
    from lm_eval.api.registry import metric_registry

    waiting, seen = [values], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # YAML aliases may be cyclic
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            metric = value.get("metric")
            known = isinstance(metric, _Code) or metric in metric_registry
            if isinstance(metric, str) and (not known or value.get("hf_evaluate")):
                yield f"the metric {metric!r}"
            if value.get("dataset_path") == "pandas":
                yield "the pickled data set"
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
