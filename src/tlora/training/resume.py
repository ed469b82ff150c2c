"""Rerunning a command: resumes the run in its folder, or finds nothing left to do."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tlora.checks import takes
from tlora.errors import ConfigError
from tlora.files import read_json
from tlora.training.digests import field_at, inputs_of
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder, process_count

logger = logging.getLogger(__name__)

# Trainer fields that cannot change the weights; a resumed run may change them.
_HARMLESS = ("save_", "logging_", "report_to", "run_name", "disable_tqdm", "log_level", "hub_")
_ADVICE = "use the same value, or another --output_dir."
_LONGER = {"train": " To train it longer, raise --epochs or --max_steps.", "init": ""}
_LENGTH = ("max_steps", "num_train_epochs")
_EPOCHS = 3.0
"""The trainer's own number of epochs."""
_ROWS = {"trainer.per_device_train_batch_size": 8, "trainer.gradient_accumulation_steps": 1}
"""Fields whose product gives a process's rows per step, with the trainer's defaults. They may
change with the number of processes."""
_MADE_BY = {"train": "run", "init": "initialization"}
"""The result of each verb."""


@dataclass(frozen=True)
class Todo:
    """The decision about a command."""

    config: RunConfig
    """Configuration to run with."""
    inputs: dict[str, str]
    """Digests of its inputs."""
    resumes: bool
    """Whether it resumes the run in the folder."""


def continued(config: RunConfig, folder: RunFolder, verb: str) -> Todo | None:
    """Return the work to do; None if everything is done.

    Every process of a launch decides this from the files alone, before any of them writes. A run
    without a checkpoint has nothing to lose: it may start over with another configuration.

    Args:
        config: the requested configuration. With `resume`, a field at its default counts as not
            given and is taken from the run in the folder.
        folder: the run's folder, existing or not.
        verb: "train" or "init".

    Raises:
        ConfigError: there is nothing to resume, the folder holds something else, or its run was
            started with other values, rows or weights and has a checkpoint; each difference is
            named. A finished run may get more steps or epochs if it has a checkpoint.
    """
    noun = _MADE_BY[verb]
    if not folder.exists:
        if config.resume:
            raise ConfigError(
                f"there is no {noun} in {folder.path} to resume; remove --resume to start "
                "one, or name its folder by --output_dir.",
                where="run",
            )
        folder.refuse_unless_free()
        return Todo(config, inputs_of(config), resumes=False)
    _refuse_other(config, folder, verb)
    saved = RunConfig.from_dict(folder.config())
    moved = _moved_inputs(config, saved, folder.inputs())
    finished = folder.finished
    trained = finished and verb == "train"
    try:
        merged = merge_saved(config, saved, moved, folder.settled(), may_grow=trained)
        if verb == "train":
            _refuse_other_steps(merged, saved, folder)
        inputs = inputs_of(merged)
        folder.refuse_changed(inputs)
    except ConfigError:
        if config.resume or finished or folder.holds_weights():
            raise
        logger.info("the %s in %s starts over with this configuration.", noun, folder.path)
        return Todo(config, inputs_of(config), resumes=False)
    longer = [name for name in _LENGTH if merged.trainer.get(name) != saved.trainer.get(name)]
    if longer:
        _announce_longer(merged, folder, longer[0])
    elif finished:
        logger.info("The %s in %s is already finished.%s", noun, folder.path, _LONGER[verb])
        return None
    return Todo(merged, inputs, resumes=True)


def _refuse_other(config: RunConfig, folder: RunFolder, verb: str) -> None:
    """Check that a folder holds the result of ``verb``, and that the command names the model."""
    if folder.verb != verb:
        raise ConfigError(
            f"{folder.path} holds the {_MADE_BY.get(folder.verb, 'result')} of `tlora"
            f" {folder.verb}`, which `tlora {verb}` does not continue; choose another"
            " --output_dir.",
            where="output_dir",
        )
    if not (config.model or config.resume):
        raise ConfigError(
            "`model` is missing; give the whole command again, or add --resume to "
            f"take it from the {_MADE_BY[verb]} in {folder.path}.",
            where="run",
        )


def _moved_inputs(config: RunConfig, saved: RunConfig, digests: dict[str, str]) -> dict[str, str]:
    """Return the given paths, by field, of inputs that have moved but not changed."""
    given, before = config.to_dict(), saved.to_dict()
    paths = {name: field_at(given, name) for name in digests}
    paths = {n: path for n, path in paths.items() if path not in (None, field_at(before, n))}
    now = inputs_of(config) if paths else {}
    return {name: path for name, path in paths.items() if now.get(name) == digests[name]}


def merge_saved(
    config: RunConfig,
    saved: RunConfig,
    moved: dict[str, str] | None = None,
    settled: Sequence[str] = (),
    may_grow: bool = False,
) -> RunConfig:
    """Return the saved configuration with the given fields that cannot change the weights.

    Args:
        config: the requested one. With `resume`, a field at its default counts as not given.
        saved: the run's original configuration, with every default written out.
        moved: new paths, by field, of unchanged files and folders.
        settled: dotted names of fields that were not given to the run either.
        may_grow: whether more steps or epochs may be requested.

    Raises:
        ConfigError: a field differs from the saved run's; all such fields are reported.
    """
    before = _flat(saved.resolved())  # including options of later versions
    if config.resume:
        default = _flat(RunConfig())
        own = {name: value for name, value in _flat(config).items() if value != default.get(name)}
        given = before | own
    else:
        given = {name: before[name] for name in settled} | _flat(config.resolved())
        # The saved values were chosen by the run itself.
        for name in ("data.label_names", "data.max_length"):
            given[name] = given[name] or before[name]
        if given["data.format"] == "auto":
            given["data.format"] = before["data.format"]
    same = {"output_dir", "resume", *_ROWS, *(moved or {})}
    if given["method"] != before["method"]:  # whose options differ
        same |= {name for name in before if name.startswith("adapter.")} - given.keys()
    if may_grow:
        same |= _extended_fields(given, before)
    faults = [
        f"`{name}` {_words(given, name, 'is')}, but {config.output_dir} was started"
        f" {_words(before, name, 'with')}; {_ADVICE}"
        for name in dict.fromkeys([*given, *before])
        if given.get(name) != before.get(name) and name not in same and not _is_harmless(name)
    ]
    if faults:
        raise ConfigError(faults, where="run")
    trainer = {n.removeprefix("trainer."): v for n, v in given.items() if n.startswith("trainer.")}
    fields = saved.to_dict() | {"resume": config.resume, "trainer": trainer}
    for name, path in {**(moved or {}), "output_dir": config.output_dir}.items():
        section, _, field = name.rpartition(".")
        (fields[section] if section else fields)[field] = path
    return RunConfig.from_dict(fields)


def _refuse_other_steps(config: RunConfig, saved: RunConfig, folder: RunFolder) -> None:
    """Check that this launch trains on as many rows per step as the last one.

    Raises:
        ConfigError: it does not.
    """
    before, now = _rows_per_process(saved), _rows_per_process(config)
    old, new = folder.processes(), process_count()
    if now * new == before * old:
        return
    processes = f"{old} process{'es' * (old > 1)}"
    raise ConfigError(
        f"the run in {folder.path} trains on {before * old} rows per step "
        f"({processes}), and this command on {now * new} ({new}); choose "
        "--batch_size, --trainer.gradient_accumulation_steps and the number of "
        f"processes so that their product is {before * old}.",
        where="run",
    )


def _rows_per_process(config: RunConfig) -> int:
    fields = _flat(config)
    return math.prod(int(fields.get(name) or own) for name, own in _ROWS.items())


def _extended_fields(given: dict[str, Any], before: dict[str, Any]) -> set[str]:
    """Return the name of the field that makes a run train longer than before, if any."""
    steps, epochs = (f"trainer.{name}" for name in _LENGTH)
    by_steps = (before.get(steps) or -1) > 0
    if not by_steps and given.get(steps) != before.get(steps):
        return set()
    name = steps if by_steps else epochs
    new, old = given.get(name), before.get(name, _EPOCHS)
    return {name} if takes(float, new) and new > old else set()


def _announce_longer(config: RunConfig, folder: RunFolder, field: str) -> None:
    """Log that a finished run trains longer, and the effect on its schedule.

    Raises:
        ConfigError: it has no checkpoint to resume from, or stopped early.
    """
    checkpoint = folder.last_checkpoint()
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {}
    early = checkpoint is not None and state["global_step"] < state["max_steps"]
    if checkpoint is None or early:
        why = "stopped early" if early else "is finished and has no checkpoint to resume from"
        raise ConfigError(
            f"{folder.path} {why}; train its adapter further by --continue_from "
            f"{folder.path}, in another --output_dir.",
            where="run",
        )
    schedule = str(config.trainer.get("lr_scheduler_type", "linear"))
    unit = "step" if field == "max_steps" else "epoch"
    effect = (
        "The learning rate stays the same."
        if schedule.startswith("constant")
        else "The learning rate goes back up, so the result differs from a single"
        f" {config.trainer[field]:g}-{unit} run."
    )
    logger.info("Training continues at step %d. %s", state["global_step"], effect)


def _is_harmless(name: str) -> bool:
    section, _, field = name.partition(".")
    return section == "trainer" and field.startswith(_HARMLESS)


def _words(values: dict[str, Any], name: str, verb: str) -> str:
    if name in values:
        return f"{verb} {values[name]!r}"
    return "is not given" if verb == "is" else "without it"


def _flat(config: RunConfig) -> dict[str, Any]:
    """Return the fields in JSON form, with dotted names for sections and open fields."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config.to_dict())).items():
        inner = value if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return flat
