"""What flags and files tell of an evaluation, checked before anything that is slow to import.

All faults come in one error. What needs a tokenizer, the rows or the Hub is checked later.
"""

from __future__ import annotations

from tlora import extras
from tlora.errors import ConfigError, Faults
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.evaluate.evaluated_models import EvaluatedModel, sketch
from tlora.evaluate.grade import check_judge
from tlora.evaluate.loading import check_backend
from tlora.evaluations import names
from tlora.registry import CONVERSATIONS, EVALUATIONS, TASKS
from tlora.tasks.base import Task


def check(config: EvalConfig) -> list[EvaluatedModel]:
    """Check an evaluation: its folder, its judge, the folders of its models, its tasks.

    Returns:
        The models as `evaluated_models.sketch` gives them; [] where some are on the Hub.

    Raises:
        ConfigError: a field is wrong, a model or a task is not there, the folder is taken, or
            several things are wrong.
        DataError: a file of rows, or of the judge's prompts, is missing.
    """
    faults, models = Faults("eval"), None
    with faults:
        EvalFolder(config.output_dir).refuse_unless_free()
    with faults:
        if config.judge.url:
            extras.require("judge", where="judge")
        check_judge(config)
    with faults:
        if config.quantization != "none":
            extras.require("quantized", where="quantization")
    if not config.only_grades:
        with faults:
            models = sketch(config)
        with faults:
            if config.backend != "hf":
                check_backend(config, models or [])
        with faults:
            _check_tasks(config, models)
    faults.raise_found()
    return models or []


def _check_tasks(config: EvalConfig, models: list[EvaluatedModel] | None) -> None:
    if models and all(evaluated.head == "labeled" for evaluated in models):
        check_labeled_rows(config)
        faults = Faults("tasks")
        for name in config.tasks:
            with faults:
                task = labeled_task(name, config)
                task.check_fields()
                task.check_held_out(config.test_file)
        faults.raise_found()
    elif models is None and any(name in TASKS.names() for name in config.tasks):
        return  # right or wrong by the head of a model on the Hub
    elif of_a_task(config):
        task = replied_task(config)
        task.check_fields()
        task.check_held_out(config.test_file)
    else:
        asked = [name for name in config.tasks if name not in CONVERSATIONS.names()]
        names.check_tasks(asked, config.allow_code_execution, config.trust_remote_code)
        names.check_files(asked, config.data_dir)


def check_labeled_rows(config: EvalConfig) -> None:
    """Check that rows which are named belong to one task.

    Raises:
        ConfigError: there are several.
    """
    if (config.test_file or config.data.dataset) and len(config.tasks) > 1:
        flag = "--test_file" if config.test_file else "--data.dataset"
        raise ConfigError(f"{flag} gives rows of one task; name one in --tasks.", where="tasks")


def of_a_task(config: EvalConfig) -> bool:
    """Return whether the rows of a registered task are asked for, and not an evaluation's.

    Raises:
        ConfigError: they are not, and fields say how they are read.
    """
    if config.test_file or config.data.kind or config.data.dataset:
        return True
    prompts = {"format"}
    if config.apply_chat_template:
        prompts |= {"chat_template"}
    if any(name in CONVERSATIONS.names() for name in config.tasks):
        prompts |= {"chat_template", "system"}
    if given := [name for name in config.data.given() if name not in prompts]:
        raise ConfigError(
            f"`data.{given[0]}` says how to read your own rows, but no rows are given; add"
            " --test_file or --data.dataset, or leave it out.",
            where="data",
        )
    return False


def replied_task(config: EvalConfig) -> Task:
    """Return the registered task whose prompts and responses are an evaluation.

    Raises:
        ConfigError: there are several tasks, the name is not registered, or its rows are not scored
            by their responses.
    """
    if len(config.tasks) > 1:
        raise ConfigError(
            "--test_file, --data.dataset and --data.kind describe one task; name one in --tasks.",
            where="tasks",
        )
    name = config.tasks[0]
    task: Task = TASKS.load(name)(config.data)
    if task.kind in ("classification", "regression"):
        raise ConfigError(
            f"{name!r} has labels, and the models write texts; give models with a trained head,"
            " or --data.kind seq2seq where the task can be put as text to text.",
            where="tasks",
        )
    if not (task.exact or task.reads_replies):
        raise ConfigError(
            f"the rows of {name!r} are not scored by their responses; leave --test_file out for"
            " the evaluations that have a --data_dir.",
            where="test_file",
        )
    return task


def labeled_task(name: str, config: EvalConfig) -> Task:
    """Return the registered task that models with a head label.

    Raises:
        ConfigError: the name is not registered, or the task asks for text.
    """
    asks = name in (*EVALUATIONS.names(), *CONVERSATIONS.names())
    task: Task | None = None if asks else TASKS.load(name)(config.data)
    if task is None or task.kind not in ("classification", "regression"):
        raise ConfigError(
            f"{name!r} asks for text, and the models label it; see `tlora list tasks`.", "tasks"
        )
    return task
