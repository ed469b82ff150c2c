"""Check an evaluation's flags and files before any slow import.

One error lists all faults. Checks that need a tokenizer, rows or the Hub come later.
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
    """Check an evaluation's folder, judge, model folders and tasks.

    Returns:
        The models from `evaluated_models.sketch`; [] if some are on the Hub.

    Raises:
        ConfigError: a field is invalid, a model or a task is missing, the folder is in use, or
            several of these.
        DataError: a file of rows or of judge prompts is missing.
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
        return  # depends on the head of a model on the Hub
    elif of_a_task(config):
        task = replied_task(config)
        task.check_fields()
        task.check_held_out(config.test_file)
    else:
        asked = [name for name in config.tasks if name not in CONVERSATIONS.names()]
        names.check_tasks(asked, config.allow_code_execution, config.trust_remote_code)
        names.check_files(asked, config.data_dir)


def check_labeled_rows(config: EvalConfig) -> None:
    """Check that rows are given for a single task.

    Raises:
        ConfigError: there are several tasks.
    """
    if (config.test_file or config.data.dataset) and len(config.tasks) > 1:
        flag = "--test_file" if config.test_file else "--data.dataset"
        raise ConfigError(
            f"{flag} gives the rows of one task; name a single task in --tasks.", where="tasks"
        )


def of_a_task(config: EvalConfig) -> bool:
    """Return whether the evaluation scores rows of a registered task.

    Raises:
        ConfigError: it does not, but fields about reading rows are set.
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
            f"`data.{given[0]}` only applies to your own rows, but no rows are given; add"
            " --test_file or --data.dataset, or remove it.",
            where="data",
        )
    return False


def replied_task(config: EvalConfig) -> Task:
    """Return the registered task whose prompts and responses are evaluated.

    Raises:
        ConfigError: there are several tasks, the name is not registered, or the task does not score
            responses.
    """
    if len(config.tasks) > 1:
        raise ConfigError(
            "--test_file, --data.dataset and --data.kind describe one task; name a single one in"
            " --tasks.",
            where="tasks",
        )
    name = config.tasks[0]
    task: Task = TASKS.load(name)(config.data)
    if task.kind in ("classification", "regression"):
        raise ConfigError(
            f"{name!r} is a classification task, but the models are generative; use models with a"
            " trained head, or --data.kind seq2seq if the task supports text to text.",
            where="tasks",
        )
    if not (task.exact or task.reads_replies):
        raise ConfigError(
            f"`--test_file` cannot score {name!r} by its responses; remove it, and use an"
            " evaluation of `tlora list evaluations`.",
            where="test_file",
        )
    return task


def labeled_task(name: str, config: EvalConfig) -> Task:
    """Return the registered task for models with a labeling head.

    Raises:
        ConfigError: the name is not registered, or the task is generative.
    """
    asks = name in (*EVALUATIONS.names(), *CONVERSATIONS.names())
    task: Task | None = None if asks else TASKS.load(name)(config.data)
    if task is None or task.kind not in ("classification", "regression"):
        raise ConfigError(
            f"{name!r} is generative, but the models are classifiers; see `tlora list tasks`.",
            "tasks",
        )
    return task
