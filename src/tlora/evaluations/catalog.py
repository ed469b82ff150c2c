"""Names of evaluations -> tasks: ours by our names, every other by lm-evaluation-harness itself."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError, TLoraError
from tlora.evaluations import consent
from tlora.evaluations.names import check_guard, check_tasks, expanded, folders, unsandboxed
from tlora.scoring.answers import PROTOCOLS
from tlora.scoring.sandbox import Protection

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_WHERE = "tasks"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user decides about evaluations of code."""

    allow_code_execution: bool = False
    """Run what the model writes, in the sandbox; without it, evaluations of code are refused."""
    protection: Protection = "namespaces"
    """How strongly the sandbox keeps programs apart; see `tlora.scoring.sandbox`."""
    samples: int = 1
    """Programs for each problem: 1 is greedy, more are drawn at `temperature`."""
    temperature: float = 0.8
    """Of drawn programs."""
    trust_remote_code: bool = False
    """Run the code that an evaluation's YAML brings; `allow_code_execution` allows that too."""


def build(
    names: Iterable[str], data_dir: str | None = None, settings: Settings | None = None
) -> dict[str, Task]:
    """Make the tasks, with all their rows read and checked.

    Args:
        names: ours (`tlora list evaluations`), or what lm-evaluation-harness calls a task, a group,
            a tag or the path of a task's YAML. Groups are expanded; a name given twice counts once.
        data_dir: folder of local files for our own; None reads from the Hub. The tasks of
            lm-evaluation-harness read from where their YAML says.
        settings: what the user decides.

    Returns:
        Tasks by name in the order of ``names``, for ``lm_eval.evaluate(task_dict=...)``.

    Raises:
        ConfigError: a name is unknown (with a suggestion), runs programs unallowed, or is a YAML
            that brings code untrusted; all such faults at once, before a row is read or a function
            imported. Or lm-evaluation-harness is not installed.
        DataError: the rows of a task cannot be had.
        SandboxError: the sandbox for programs does not work on this machine.
    """
    settings = settings or Settings()
    names = list(names)
    given = dataclasses.asdict(settings) | {"data_dir": data_dir}
    trusted = given.pop("trust_remote_code")
    index = _index(names, given)
    wanted = expanded(names)
    others = [name for name in wanted if name not in index.task_index]
    theirs: Any = _theirs() if others else index
    consent.sandbox_templates()
    check_tasks(names, settings.allow_code_execution, trusted, theirs=theirs.task_index)
    tasks: dict[str, Task] = {}
    for name in wanted:
        tasks |= _load(theirs if name in others else index, name, settings)
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
    names = list(names)
    check_guard(names, where)
    index, wanted = _index(names, {"data_dir": data_dir}), expanded(names)
    made = {name: _load(index, name, Settings())[name] for name in wanted}
    return {
        name: [task.doc_to_text(doc) for doc in task.test_docs()] for name, task in made.items()
    }


def ours(task: Task) -> bool:
    """Whether a task is one of ours and not one of lm-evaluation-harness."""
    return "protocol" in (task.config.metadata or {})


def protocol(task: Task) -> str:
    """Return in a line what a task is and where it is from."""
    if ours(task):
        own = task.config.metadata["protocol"]
        rule = PROTOCOLS.get(task.config.filter_list[0]["name"])
        return own.replace("{source}", rule.source) if rule else own
    version = importlib.metadata.version("lm_eval")
    shots = task.config.num_fewshot or 0
    return (
        f"lm-evaluation-harness {version}, {task.task_name} (version {task.VERSION}),"
        f" {shots}-shot, {task.OUTPUT_TYPE}"
    )


def _index(names: Iterable[str], given: dict[str, Any]) -> TaskManager:
    """Index the YAML files of those of our evaluations that are among ``names``.

    Args:
        names: ours and others.
        given: what every YAML of ours gets as its metadata.
    """
    from lm_eval.tasks import TaskManager

    given = {name: value for name, value in given.items() if value is not None}
    return TaskManager(include_path=folders(names), include_defaults=False, metadata=given)


@functools.cache
def _theirs() -> TaskManager:
    """Return the index of lm-evaluation-harness, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: TaskManager, name: str, settings: Settings) -> dict[str, Task]:
    """Load a task, or all tasks of a group of theirs.

    Raises:
        DataError: it cannot be loaded, mostly for want of its data.
        ConfigError: it would run programs, unallowed.
        SandboxError: as `build`.
    """
    log = logging.getLogger("lm_eval.api.task")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every task whose rows a function reads, as ours
    try:
        found = manager.load([name])["tasks"]
    except TLoraError:
        raise
    except Exception as error:  # whatever a task's YAML, code and data can raise
        cause = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name}: lm-evaluation-harness cannot load it ({type(error).__name__}: {cause});"
            " is the Hub in reach?"
        ) from error
    finally:
        log.setLevel(level)
    unsafe = [task for task, made in found.items() if getattr(made, "UNSAFE_CODE", False)]
    if unsafe and not settings.allow_code_execution:
        raise ConfigError(unsandboxed(name), where=_WHERE)
    return found
