"""The rows of a registered task that an evaluation scores: the user's file, or the Hub's own."""

from __future__ import annotations

from typing import Any

from tlora.errors import ConfigError, DataError
from tlora.evalconfig import EvalConfig
from tlora.registry import TASKS
from tlora.tasks import source
from tlora.tasks.base import Row, Task


def one_task(config: EvalConfig) -> tuple[str, Task]:
    """Return the name and the task of an evaluation of a file.

    Raises:
        ConfigError: there are several, or the name is not registered.
    """
    if len(config.tasks) > 1:
        raise ConfigError("--test_file and --data.kind are of one task; give one.", where="tasks")
    name = config.tasks[0]
    return name, TASKS.load(name)(config.data)


def scored_rows(name: str, task: Task, config: EvalConfig, limited: bool = False) -> list[Row]:
    """Return the rows to score: all, or if ``limited`` those that `limit` of the evaluation leaves.

    Raises:
        ConfigError: the task has no rows of its own, and no file is given.
        DataError: a row is not what the task expects.
    """
    split = config.data.eval_split or task.hub_eval_split
    raw: Any
    if config.test_file:
        where = config.test_file
        raw, _ = task.load(config.test_file, None)
    elif task.hub and split:
        where = f"{task.hub[0]}, {split}"
        raw = source.read_hub(*task.hub, split)
    else:
        raise ConfigError(f"{name!r} has no rows of its own; give --test_file.", where="test_file")
    if limited:
        raw = raw.select(range(config.asked(len(raw))))
    rows = [task.row(row, f"{where}, row {number + 1}") for number, row in enumerate(raw)]
    if not rows:
        raise DataError(f"{where}: there are no rows.")
    return rows
