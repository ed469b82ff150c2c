"""Names of evaluations, and whether they run programs, read from their YAML files alone.

lm-evaluation-harness takes seconds to import and again to index its own tasks. To reject a wrong
name at once, this module searches the harness' files for the name and reads ours.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from tlora import extras
from tlora.errors import ConfigError, Faults, did_you_mean
from tlora.evaluations import consent
from tlora.evaluations.rows import Source
from tlora.registry import EVALUATIONS, TASKS

_NAMED = re.compile(rb"^(?:task|group)[ \t]*:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)


def check_tasks(
    names: Iterable[str],
    allow_code_execution: bool,
    trust_remote_code: bool = False,
    *,
    theirs: Collection[str] | None = None,
    where: str = "tasks",
) -> None:
    """Check the names of tasks.

    Args:
        names: our evaluations and groups, names of lm-evaluation-harness, or paths of YAML files.
        allow_code_execution: whether programs written by the model may run.
        trust_remote_code: whether code that comes with a YAML may run; implied by
            `allow_code_execution`.
        theirs: names of lm-evaluation-harness; None: any word in its files may be one.
        where: what error messages call the field.

    Raises:
        ConfigError: a name is unknown (with a suggestion), runs programs without permission, or is
            a YAML with untrusted code; one error lists all such faults. Or lm-evaluation-harness is
            not installed.
    """
    extras.require("eval", where)
    own, wanted = _ours(names)
    others = [name for name in wanted if name not in own]
    faults: list[str] = []
    unsafe: list[str] = []
    if others:
        known = _HarnessFiles.read() if theirs is None else theirs
        # Words like `jsonl` occur in their files without naming a task.
        rows = {name for name in others if name in TASKS.names()}.difference(known)
        faults = [
            f"there is no task {name!r}.{_hint(name, known)}"
            for name in others
            if (not Path(name).is_file() and name not in known) or name in rows
        ]
        if theirs is None:
            unsafe = [name for name in others if _HarnessFiles.read().runs_programs(name)]
        if not (trust_remote_code or allow_code_execution):
            faults += _bringing_code(name for name in others if name not in known)
    if not allow_code_execution:
        faults += [
            f"{name!r} runs programs written by the model; read docs/evaluation.md, then pass"
            " allow_code_execution, or remove it."
            for name in _of_code(own, wanted)
        ]
        faults += [unsandboxed(name) for name in unsafe]
    if faults:
        raise ConfigError(faults, where=where)


def _bringing_code(names: Iterable[str]) -> Iterator[str]:
    """Yield an error for each YAML that would run its author's code."""
    for name in names:
        if Path(name).is_file() and (found := consent.code_in(name)):
            yield (
                f"{name!r} runs Python code outside of the sandbox: {', '.join(found)}; read it,"
                " then pass trust_remote_code or allow_code_execution, or remove it."
            )


def check_guard(names: Iterable[str], where: str) -> None:
    """Check the evaluations whose questions training rows must not repeat.

    Args:
        names: of our evaluations and groups. Those that run programs put a problem into words of
            their own, which rows of other sources do not have.
        where: what error messages call the field.

    Raises:
        ConfigError: a name is not ours, or it runs programs; one error lists all such faults. Or
            lm-evaluation-harness is not installed.
    """
    extras.require("eval", where)
    own, wanted = _ours(names)
    known = EVALUATIONS.names()
    faults = [
        f"there is no built-in evaluation {name!r}."
        f"{did_you_mean(name, known) or ' Run `tlora list evaluations`.'}"
        for name in wanted
        if name not in own
    ]
    faults += [
        f"{name!r} has its own wording for coding problems, which training rows do not repeat;"
        " remove it."
        for name in _of_code(own, wanted)
    ]
    if faults:
        raise ConfigError(faults, where=where)


def check_files(names: Iterable[str], data_dir: str | None) -> list[Path]:
    """Return the files with the rows of our evaluations in the user's folder; [] for the Hub.

    Raises:
        DataError: a file is missing.
    """
    own, wanted = _ours(names)
    faults, files = Faults("data_dir"), []
    for name in wanted:
        with faults:
            if given := own.get(name, {}).get("dataset_kwargs"):
                files.append(Source.of(given).check(name, data_dir))
    faults.raise_found()
    return [file for file in files if file]


def expanded(names: Iterable[str]) -> list[str]:
    """Replace our groups by their members and drop duplicates."""
    return _ours(names)[1]


def unsandboxed(name: str) -> str:
    """Return the error for a task of lm-evaluation-harness that runs programs."""
    return (
        f"{name!r} of lm-evaluation-harness runs programs without a sandbox; pass"
        " allow_code_execution to accept this, or use a built-in evaluation."
    )


def folders(names: Iterable[str]) -> list[str]:
    """Return the folders of our evaluations among ``names``."""
    known = EVALUATIONS.names()
    return sorted({str(Path(EVALUATIONS.load(name)).parent) for name in names if name in known})


def _ours(names: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the YAML of all evaluations next to ours among ``names``, and `expanded` names."""
    names = list(names)
    own: dict[str, dict[str, Any]] = {}
    for folder in folders(names):
        for path in sorted(Path(folder).glob("**/*.yaml")):
            found = _settings(path)
            own[str(found.get("group") or found.get("task"))] = found
    wanted: list[str] = []
    for name in names:
        found = own.get(name, {})
        wanted += found["task"] if "group" in found else [name]
    return own, list(dict.fromkeys(wanted))


def _of_code(own: dict[str, dict[str, Any]], wanted: list[str]) -> list[str]:
    return [name for name in wanted if own.get(name, {}).get("unsafe_code")]


def _settings(path: Path, includers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read an evaluation's YAML and its includes, keeping functions as names."""
    import yaml

    try:
        path = path.resolve()
        found = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (OSError, RecursionError, *consent.BAD_VALUES, yaml.YAMLError):
        return {}  # lm-evaluation-harness reports the error
    if not isinstance(found, dict) or path in includers:
        return {}
    included = found.get("include", [])
    below: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        below |= _settings(path.parent / str(name), (*includers, path))
    return below | found


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Reads function names as text."""

    as_text: Any = Loader.construct_scalar
    Loader.add_constructor("!function", as_text)
    return Loader


class _HarnessFiles(Collection[str]):
    """The names of lm-evaluation-harness, found by searching its files.

    `in` is true for every word in the files, even if it is not a task; iterating yields the names
    that appear literally.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._all = b"\n".join(files.values())

    @classmethod
    @functools.cache
    def read(cls) -> _HarnessFiles:
        """Read the files of the installed package, 7 MB."""
        spec = importlib.util.find_spec("lm_eval")
        read: dict[str, bytes] = {}
        for home in (spec and spec.submodule_search_locations) or []:
            for folder, _, files in os.walk(Path(home, "tasks")):
                for name in files:
                    if "yaml" in name or "." not in name:  # includes may have no suffix
                        path = f"{folder}/{name}"
                        with open(path, "rb") as file:  # noqa: PTH123, twice as fast for 14,000
                            read[path] = file.read()
        return cls(read)

    def __contains__(self, name: object) -> bool:
        word = re.escape(str(name).encode())
        return re.search(rb"(?<![\w-])" + word + rb"(?![\w-])", self._all) is not None

    def __iter__(self) -> Iterator[str]:
        return (name.decode(errors="replace") for name in _NAMED.findall(self._all))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def runs_programs(self, name: str) -> bool:
        """Return whether the file of a task or path declares that it runs programs."""
        if Path(name).is_file():
            return bool(_settings(Path(name)).get("unsafe_code"))
        word = name.encode()
        files = [
            f for f, text in self._files.items() if word in text and word in _NAMED.findall(text)
        ]
        return any(_settings(Path(file)).get("unsafe_code") for file in files)


def _hint(name: str, theirs: Iterable[str]) -> str:
    ours = [known for known in EVALUATIONS.names() if known.startswith(f"{name}-")]
    if ours:  # a data set without its protocol
        return f" Did you mean {' or '.join(map(repr, ours))}?"
    if name in TASKS.names():
        return f" {name!r} is a training task; give --test_file with the rows to score."
    return did_you_mean(name, [*EVALUATIONS.names(), *theirs]) or (
        " Run `tlora list evaluations` for built-in ones, or `lm_eval ls tasks` for those of"
        " lm-evaluation-harness."
    )
