"""What evaluations are called, and which of them run programs, read from their YAML files alone.

lm-evaluation-harness takes seconds to import and as long again to index its own tasks. A wrong name
should be refused at once, so its files are searched for the name here, and ours are read.
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
    """Check what is to be evaluated.

    Args:
        names: of our evaluations and groups, of lm-evaluation-harness, or paths of YAML files.
        allow_code_execution: whether programs that the model writes may run.
        trust_remote_code: whether code that a YAML brings may run; `allow_code_execution` lets it
            run too.
        theirs: names of lm-evaluation-harness; None: whatever its files mention may be one.
        where: what error messages call the field.

    Raises:
        ConfigError: a name is unknown (with a suggestion), or runs programs unallowed, or is a YAML
            that brings code untrusted; all such faults at once. Or lm-evaluation-harness is not
            installed.
    """
    extras.require("eval", where)
    own, wanted = _ours(names)
    others = [name for name in wanted if name not in own]
    faults: list[str] = []
    unsafe: list[str] = []
    if others:
        known = _HarnessFiles.read() if theirs is None else theirs
        # Words like `jsonl` stand in their files, but name nothing there.
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
            f"{name!r} runs the programs that the model writes; read docs/evaluation.md, then pass"
            " allow_code_execution, or leave it out."
            for name in _of_code(own, wanted)
        ]
        faults += [unsandboxed(name) for name in unsafe]
    if faults:
        raise ConfigError(faults, where=where)


def _bringing_code(names: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for each YAML of these that would run code of its author's."""
    for name in names:
        if Path(name).is_file() and (found := consent.code_in(name)):
            yield (
                f"{name!r} runs Python code outside of the sandbox: {', '.join(found)}; read it,"
                " then pass trust_remote_code or allow_code_execution, or leave it out."
            )


def check_guard(names: Iterable[str], where: str) -> None:
    """Check the evaluations whose questions are to be kept apart from training rows.

    Args:
        names: of our evaluations and groups. Those that run programs put a problem into words of
            their own, which rows of other sources do not have.
        where: what error messages call the field.

    Raises:
        ConfigError: a name is not ours, or its programs are asked for; all such faults at once. Or
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
        f"{name!r} asks for programs in words of its own, which training rows do not repeat; leave"
        " it out."
        for name in _of_code(own, wanted)
    ]
    if faults:
        raise ConfigError(faults, where=where)


def check_files(names: Iterable[str], data_dir: str | None) -> list[Path]:
    """Return the files in the user's folder with the rows of our evaluations; [] for the Hub.

    Raises:
        DataError: they are not there.
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
    """Return names with the members of our groups in their place, each once."""
    return _ours(names)[1]


def unsandboxed(name: str) -> str:
    """Return why a task of lm-evaluation-harness that runs programs is refused."""
    return (
        f"{name!r} of lm-evaluation-harness runs programs, and without a sandbox; pass"
        " allow_code_execution if you mean to, or use a built-in evaluation."
    )


def folders(names: Iterable[str]) -> list[str]:
    """Return the folders of those of our evaluations that are among ``names``."""
    known = EVALUATIONS.names()
    return sorted({str(Path(EVALUATIONS.load(name)).parent) for name in names if name in known})


def _ours(names: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the YAML of all evaluations beside ours among ``names``, and `expanded` names."""
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


def _settings(path: Path) -> dict[str, Any]:
    """Read an evaluation's YAML and what it includes; functions stay the names that they are."""
    import yaml

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # lm-evaluation-harness says what is wrong
    if not isinstance(found, dict):
        return {}
    included = found.get("include", [])
    below: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        below |= _settings(path.parent / name)
    return below | found


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Takes the name of a function for text."""

    as_text: Any = Loader.construct_scalar
    Loader.add_constructor("!function", as_text)
    return Loader


class _HarnessFiles(Collection[str]):
    """The names of lm-evaluation-harness, as far as its files show them unread.

    `in` is true for every word of theirs, also for those that name no task; iterating gives the
    names that stand written out.
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
                    if "yaml" in name or "." not in name:  # what a YAML includes may have no ending
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
        """Return whether the file of a task, or one given by its path, says so."""
        if Path(name).is_file():
            return bool(_settings(Path(name)).get("unsafe_code"))
        word = name.encode()
        files = [
            f for f, text in self._files.items() if word in text and word in _NAMED.findall(text)
        ]
        return any(_settings(Path(file)).get("unsafe_code") for file in files)


def _hint(name: str, theirs: Iterable[str]) -> str:
    ours = [known for known in EVALUATIONS.names() if known.startswith(f"{name}-")]
    if ours:  # a data set without the protocol that is to read it
        return f" Did you mean {' or '.join(map(repr, ours))}?"
    if name in TASKS.names():
        return f" {name!r} is one to train on; give --test_file with the rows to score."
    return did_you_mean(name, [*EVALUATIONS.names(), *theirs]) or (
        " Run `tlora list evaluations` for ours; lm-evaluation-harness lists its own by `lm_eval ls"
        " tasks`."
    )
