"""Names of evaluations -> tasks: ours by our names, every other by lm-evaluation-harness itself."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError, TLoraError, did_you_mean
from tlora.registry import EVALUATIONS, TASKS

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from tlora.evaluation.harness.base import Settings

_WHERE = "tasks"


def names() -> list[str]:
    """Return the names of our own evaluations and groups; nothing is imported."""
    return EVALUATIONS.names()


@dataclass(frozen=True)
class Described:
    """One evaluation or group of ours, for a listing."""

    name: str
    summary: str
    """What it is, in a few words."""
    protocol: str
    """Prompt, reading and scoring with their sources; of a group, its members."""


def entries() -> list[Described]:
    """Describe our own evaluations and groups, which imports them all but reads no rows."""
    from tlora.evaluation.harness.base import Group

    found = []
    for entry in EVALUATIONS.entries():
        made = EVALUATIONS.load(entry.name)
        said = ", ".join(made.members) if isinstance(made, Group) else made.protocol
        found.append(Described(entry.name, entry.summary, said))
    return found


def build(
    names: Iterable[str], data_dir: str | None = None, settings: Settings | None = None
) -> dict[str, Task]:
    """Make the tasks, with all their rows read and checked.

    Args:
        names: ours (`names`), or what lm-evaluation-harness calls a task, a group, a tag or the
            path of a task's YAML. Groups are expanded; a name given twice counts once.
        data_dir: folder of local files for our own; None reads from the Hub. The tasks of
            lm-evaluation-harness read from where their YAML says.
        settings: what the user decides.

    Returns:
        Tasks by name in the order of ``names``, for ``lm_eval.evaluate(task_dict=...)``.

    Raises:
        ConfigError: a name is unknown (with a suggestion), or runs programs unallowed; all such
            faults at once, before a row is read. Or lm-evaluation-harness is not installed.
        DataError: the rows of a task cannot be had.
        SandboxError: the sandbox for programs does not work on this machine.
    """
    _require_harness(_WHERE)
    from tlora.evaluation.harness.base import Settings

    settings = settings or Settings()
    wanted = _expanded(names)
    makers = {name: EVALUATIONS.load(name) for name in wanted if name in EVALUATIONS.names()}
    others = _Others([name for name in wanted if name not in makers])
    faults = [*others.unknown(), *_code_faults(makers, settings)]
    if faults:
        raise ConfigError(faults, where=_WHERE)
    tasks: dict[str, Task] = {}
    for name in wanted:
        if name in makers:
            tasks[name] = makers[name](name, data_dir, settings)
        else:
            tasks |= others.load(name, settings)
    return tasks


def prompts(names: Iterable[str], data_dir: str | None, where: str) -> dict[str, list[str]]:
    """Return what evaluations of ours ask, every row, by name; groups are expanded.

    Args:
        names: of our evaluations and groups. Those that run programs put a problem into words of
            their own, which rows of other sources do not have.
        data_dir: as `build`.
        where: what error messages call the field.

    Raises:
        ConfigError: a name is not ours, or its programs are asked for; all such faults at once. Or
            lm-evaluation-harness is not installed.
        DataError: the rows cannot be had.
    """
    _require_harness(where)
    known, wanted = EVALUATIONS.names(), _expanded(names)
    faults = [
        f"there is no evaluation of ours {name!r}."
        f"{did_you_mean(name, known) or ' Run `tlora list evaluations`.'}"
        for name in wanted
        if name not in known
    ]
    makers = {name: EVALUATIONS.load(name) for name in wanted if name in known}
    faults += [
        f"{name!r} asks for programs in words of its own, which training rows do not repeat; leave"
        " it out."
        for name, maker in makers.items()
        if maker.runs_code
    ]
    if faults:
        raise ConfigError(faults, where=where)
    made = {name: maker(name, data_dir) for name, maker in makers.items()}
    return {
        name: [task.doc_to_text(doc) for doc in task.test_docs()] for name, task in made.items()
    }


def _require_harness(where: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness is not installed; run pip install 'tlora[eval]'.", where=where
        )


def protocol(task: Task) -> str:
    """Return in a line what a task is and where it is from."""
    if own := getattr(task, "protocol", None):
        return own
    version = importlib.metadata.version("lm_eval")
    shots = task.config.num_fewshot or 0
    return (
        f"lm-evaluation-harness {version}, {task.task_name} (version {task.VERSION}),"
        f" {shots}-shot, {task.OUTPUT_TYPE}"
    )


def _expanded(names: Iterable[str]) -> list[str]:
    """Return the names with our groups' members in their place, each once."""
    from tlora.evaluation.harness.base import Group

    known = EVALUATIONS.names()
    found: list[str] = []
    for name in names:
        made = EVALUATIONS.load(name) if name in known else None
        found += made.members if isinstance(made, Group) else [name]
    return list(dict.fromkeys(found))


def _code_faults(makers: dict[str, Any], settings: Settings) -> list[str]:
    if settings.allow_code_execution:
        return []
    return [
        f"{name!r} runs the programs that the model writes; read docs/evaluation.md, then pass"
        " allow_code_execution, or leave it out."
        for name, maker in makers.items()
        if maker.runs_code
    ]


@functools.cache
def _manager() -> Any:
    """Return the index of lm-evaluation-harness, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class _Others:
    """Tasks that lm-evaluation-harness brings; its index is read only if one is asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._manager: Any = _manager() if names else None

    def unknown(self) -> list[str]:
        """Return a sentence for each name that is neither ours nor theirs, nor a YAML file."""
        theirs = self._manager.all_tasks if self.names else []
        return [
            f"there is no task {name!r}.{_hint(name, theirs)}"
            for name in self.names
            if name not in self._manager.task_index and not Path(name).is_file()
        ]

    def load(self, name: str, settings: Settings) -> dict[str, Task]:
        """Load a task, or all tasks of a group.

        Raises:
            DataError: it cannot be loaded, mostly for want of its data.
            ConfigError: it would run programs, unallowed.
        """
        try:
            found = self._manager.load([name])["tasks"]
        except TLoraError:
            raise
        except Exception as error:  # whatever a task's YAML, code and data can raise
            cause = " ".join(str(error).split())[:300]
            raise DataError(
                f"{name}: lm-evaluation-harness cannot load it ({type(error).__name__}: {cause});"
                " is the Hub in reach?"
            ) from error
        unsafe = [task for task, made in found.items() if getattr(made, "UNSAFE_CODE", False)]
        if unsafe and not settings.allow_code_execution:
            raise ConfigError(
                f"{name!r} of lm-evaluation-harness runs programs, and without a sandbox; pass"
                " allow_code_execution if that is meant, or use one of ours.",
                where=_WHERE,
            )
        return found


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
