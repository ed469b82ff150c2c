"""Checks a run's flags and files before any slow import.

All faults are raised in one error. Checks that need the tokenizer, the rows or the model come
later.
"""

from __future__ import annotations

from pathlib import Path

from tlora import extras
from tlora.errors import ConfigError, Faults
from tlora.evaluations import names
from tlora.files import refuse_unusable
from tlora.methods.lorarite import OPTIM
from tlora.models.pretrained import check_hub, check_model_folder
from tlora.registry import METHODS, TASKS
from tlora.tasks.base import Task
from tlora.tasks.rendering import named_template
from tlora.training.kinds import KINDS, check_trainer_fields, with_task_type
from tlora.training.runconfig import RunConfig


def check(config: RunConfig, validation: str | None = None) -> None:
    """Check a run: the model's folder, the method, the task, the trainer's fields, the files.

    Args:
        config: the run.
        validation: a further file of evaluation rows.

    Raises:
        ConfigError: a field is missing, unknown or out of range, or several things are wrong.
        DataError: a file of rows is missing, of an unknown kind or empty.
    """
    faults = Faults("run")
    with faults:
        check_without_rows(config)
    with faults:
        task = task_of(config)
        with faults:
            if task.reads_replies or KINDS[task.kind].task_type == "SEQ_CLS":
                extras.require("compare", where="task")  # its metrics need scipy and scikit-learn
        with faults:
            task.check_sources(config.train_file, config.eval_file)
        with faults:
            if validation is not None:
                task.check_files(validation, columns=False)
    with faults:
        if config.data.guard:
            names.check_guard(config.data.guard, where="data.guard")
            names.check_files(config.data.guard, config.data.guard_dir)
    with faults:
        _check_cache(config.calibration.cache)
    faults.raise_found()


def check_without_rows(config: RunConfig) -> None:
    """Do the checks of `check` except those of rows, which a dry run does not need.

    Raises:
        ConfigError: a field is missing, unknown or out of range, or several things are wrong.
    """
    faults = Faults("run")
    with faults:
        if not config.model:
            advice = "give --model, a folder or a name on the Hub"
            raise ConfigError(f"`model` is missing; {advice}.", "run")
        check_model_folder(config.model)
        if not Path(config.model).exists():
            check_hub(config.model, "config.json")
    with faults:
        if config.quantization != "none":
            extras.require("quantized", where="quantization")
    with faults:
        if config.data.chat_template:
            named_template(config.data.chat_template)
    with faults:
        config.options()
    with faults:
        kind = KINDS[task_of(config).kind]
        with faults:
            check_trainer_fields(kind, config.trainer)
        with faults:
            with_task_type(kind, config.options())
    with faults:
        check_optimizer(config)
    faults.raise_found()


def check_optimizer(config: RunConfig) -> None:
    """Check that the optimizer LoRA-RITE, if the trainer's `optim` names it, suits the method.

    Raises:
        ConfigError: the method trains no plain A and B, or has its own optimizer.
    """
    if config.trainer.get("optim") != OPTIM:
        return
    traits, why = METHODS.load(config.method).traits, None
    if "lora_B" not in traits.trains:
        why = f"steps the factors A and B of a LoRA, and {config.method!r} trains none; choose"
    elif not traits.plain:
        why = f"steps A and B as PEFT makes them, and {config.method!r} replaces them; choose"
    elif getattr(config.options(), "own_optimizer", False):
        why = f"would replace the optimizer of the method {config.method!r}; choose"
    if why:
        raise ConfigError(f"`optim` {OPTIM!r} {why} another optimizer.", where="trainer")


def check_evaluation(config: RunConfig) -> None:
    """Check that a run with evaluations during training has rows for them.

    Raises:
        ConfigError: it has none.
    """
    given = {name: config.trainer.get(name) for name in ("eval_strategy", "eval_on_start")}
    given["early_stopping"] = config.early_stopping
    faults = [
        f"`{name}` is {value!r}, but there are no evaluation rows; give --eval_file or"
        " --data.val_size."
        for name, value in given.items()
        if value not in (None, False, "no")
    ]
    if faults and not task_of(config).evaluates(config.train_file, config.eval_file):
        raise ConfigError(faults, where="trainer")


def task_of(config: RunConfig) -> Task:
    """Return the task of a run.

    Raises:
        ConfigError: there is none of that name, or `data` does not fit it.
    """
    return TASKS.load(config.task)(config.data)


def _check_cache(path: str | None) -> None:
    if path is not None:
        try:
            refuse_unusable(Path(path).parent)
        except ConfigError:
            raise ConfigError(
                f"{path} cannot be written; give another file.", where="calibration.cache"
            ) from None
