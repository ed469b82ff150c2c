"""Load evaluation tasks by name: ours, or from lm-evaluation-harness."""

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
    """User settings for code evaluations."""

    allow_code_execution: bool = False
    """Run programs written by the model in the sandbox; otherwise code evaluations are rejected."""
    protection: Protection = "namespaces"
    """Isolation level of the sandbox; see `tlora.scoring.sandbox`."""
    samples: int = 1
    """Programs per problem: 1 is greedy, more are sampled at `temperature`."""
    temperature: float = 0.8
    """Temperature for sampled programs."""
    trust_remote_code: bool = False
    """Run code that comes with an evaluation's YAML; `allow_code_execution` implies this."""


def build(
    names: Iterable[str], data_dir: str | None = None, settings: Settings | None = None
) -> dict[str, Task]:
    """Make the tasks, with all their rows read and checked.

    Args:
        names: our names (`tlora list evaluations`), or tasks, groups, tags or YAML paths of
            lm-evaluation-harness. Groups are expanded and duplicates dropped.
        data_dir: folder of local files for our evaluations; None reads from the Hub. Tasks of
            lm-evaluation-harness read from the source in their YAML.
        settings: user settings.

    Returns:
        Tasks by name in the order of ``names``, for ``lm_eval.evaluate(task_dict=...)``.

    Raises:
        ConfigError: a name is unknown (with a suggestion), runs programs without permission, or is
            a YAML with untrusted code; one error lists all such faults before reading rows or
            importing functions. Or lm-evaluation-harness is not installed.
        DataError: the rows of a task are unavailable.
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
    """Return all prompts of our evaluations by name, with groups expanded.

    Args:
        names: our evaluations and groups, except those that run programs, whose prompts have
            their own wording that training rows do not repeat.
        data_dir: as `build`.
        where: the field's name in error messages.

    Raises:
        ConfigError: a name is not ours, or it runs programs; one error lists all such faults. Or
            lm-evaluation-harness is not installed.
        DataError: the rows are unavailable.
    """
    names = list(names)
    check_guard(names, where)
    index, wanted = _index(names, {"data_dir": data_dir}), expanded(names)
    made = {name: _load(index, name, Settings())[name] for name in wanted}
    return {
        name: [task.doc_to_text(doc) for doc in task.test_docs()] for name, task in made.items()
    }


def ours(task: Task) -> bool:
    """Whether a task is ours rather than from lm-evaluation-harness."""
    return "protocol" in (task.config.metadata or {})


def protocol(task: Task) -> str:
    """Return one line with a task's name and source."""
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
    """Index the YAML files of our evaluations among ``names``.

    Args:
        names: our and other names.
        given: metadata for each of our YAML files.
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
    """Load a task, or all tasks of a harness group.

    Raises:
        DataError: it cannot be loaded, usually because its data is missing.
        ConfigError: it would run programs without permission.
        SandboxError: as `build`.
    """
    log = logging.getLogger("lm_eval.api.task")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about tasks with a row function, such as ours
    try:
        found = manager.load([name])["tasks"]
    except TLoraError:
        raise
    except Exception as error:  # a task's YAML, code and data can raise anything
        cause = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name}: lm-evaluation-harness cannot load it ({type(error).__name__}: {cause});"
            " check the connection to the Hub."
        ) from error
    finally:
        log.setLevel(level)
    unsafe = [task for task, made in found.items() if getattr(made, "UNSAFE_CODE", False)]
    if unsafe and not settings.allow_code_execution:
        raise ConfigError(unsandboxed(name), where=_WHERE)
    return found
