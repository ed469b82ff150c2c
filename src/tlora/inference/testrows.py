"""The rows of a registered task that an evaluation scores: a file's, a dataset's, or its own."""

from __future__ import annotations

from tlora.errors import ConfigError, DataError
from tlora.evalconfig import EvalConfig
from tlora.registry import TASKS
from tlora.tasks.base import Row, Task


def of_a_task(config: EvalConfig) -> bool:
    """Return whether the rows of a registered task are asked for, and not an evaluation's.

    Raises:
        ConfigError: they are not, and fields say how they are read.
    """
    if config.test_file or config.data.kind or config.data.dataset:
        return True
    if given := config.data.given():
        raise ConfigError(
            f"`data.{given[0]}` says how rows of yours are read, and evaluations have their own;"
            " give --test_file or --data.dataset too, or leave it out.",
            where="data",
        )
    return False


def one_task(config: EvalConfig) -> tuple[str, Task]:
    """Return the name and the task of an evaluation of its rows.

    Raises:
        ConfigError: there are several, or the name is not registered.
    """
    if len(config.tasks) > 1:
        raise ConfigError(
            "--test_file, --data.dataset and --data.kind are of one task; give one.", where="tasks"
        )
    name = config.tasks[0]
    return name, TASKS.load(name)(config.data)


def scored_rows(task: Task, config: EvalConfig, limited: bool = False) -> list[Row]:
    """Return the rows to score: all, or if ``limited`` those that `limit` of the evaluation leaves.

    Raises:
        ConfigError: the task has no rows of its own, and none are named.
        DataError: a row is not what the task expects.
    """
    raw, where = task.held_out(config.test_file)
    if limited:
        raw = raw.select(range(config.asked(len(raw))))
    rows = [task.row(row, f"{where}, row {number + 1}") for number, row in enumerate(raw)]
    if not rows:
        raise DataError(f"{where}: there are no rows.")
    return rows
