"""Which class each output of a model with a head is: from its run, or its own configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlora.errors import ConfigError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel, labels_texts
from tlora.models.pretrained import Pretrained
from tlora.registry import TASKS
from tlora.training.runfolder import RunFolder


@dataclass(frozen=True)
class Outputs:
    """What is known of the outputs of a model."""

    names: list[str] | None
    """The classes in the order of the outputs; None where nothing tells it."""
    trained: bool
    """Whether the record of its training says so."""


def outputs_of(evaluated: EvaluatedModel, config: EvalConfig) -> Outputs:
    """Return what is known of the outputs of a model, from files alone.

    The record of a run of `tlora train` comes first. Else the model's configuration tells it, where
    it has a head and the names are more than numbers ("LABEL_0").
    """
    run = _run_of(evaluated)
    names = _recorded(run) if run else None
    if names or (run and evaluated.adapter):
        # What the base of a run's adapter says is of the head that the run has put aside.
        return Outputs(names, trained=names is not None)
    return Outputs(_configured(evaluated, config), trained=False)


def order_of(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return where each of ``wanted`` stands in ``names``, None if they are not the same classes.

    Upper and lower case are one, unless they tell classes apart.
    """
    for same in (str, str.casefold):
        left, right = [same(name) for name in names], [same(name) for name in wanted]
        if len(set(left)) == len(left) == len(right) and set(left) == set(right):
            return [left.index(name) for name in right]
    return None


def chosen_order(
    evaluated: EvaluatedModel,
    found: Outputs,
    wanted: Sequence[str],
    given: list[str] | None,
    fixed: bool,
) -> list[int]:
    """Return which output of a model is each class of a task.

    Args:
        evaluated: the model, for messages.
        found: what is known of its outputs.
        wanted: the classes of the task.
        given: the classes in the order of the outputs, as the user says; None: not said.
        fixed: whether the task's own order is that of models that tell nothing.

    Raises:
        ConfigError: nothing tells the order, the classes are others, or the user's order is not
            that of training.
    """
    known = order_of(found.names, given) if given and found.trained and found.names else None
    if given and found.names and known not in (None, [*range(len(given))]):
        raise ConfigError(
            f"{', '.join(given)} is not the order in which {evaluated.name} was trained"
            f" ({', '.join(found.names)}); leave it out.",
            where="data.label_names",
        )
    names = given or found.names
    if fixed and not given and (names is None or names == [str(n) for n in range(len(names))]):
        return [*range(len(wanted))]
    if names is None:
        raise ConfigError("name the classes in the order of training.", "data.label_names")
    order = order_of(names, wanted)
    if order is None:
        raise ConfigError(
            f"the outputs of {evaluated.name} are {', '.join(names)}, and the classes that are"
            f" asked for {', '.join(wanted)}; give a model of these classes, or if only its names"
            " are others, --data.label_names with these in the order of its outputs.",
            where="models",
        )
    return order


def _run_of(evaluated: EvaluatedModel) -> RunFolder | None:
    """Return the run that a model or an adapter is in, at its end or as a checkpoint."""
    folder = Path(evaluated.path)
    for run in (RunFolder(folder.parent), RunFolder(folder.parent.parent)):
        if run.exists and folder in (run.adapter, run.checkpoints / folder.name):
            return run
    return None


def _recorded(run: RunFolder) -> list[str] | None:
    values = run.config()
    task = values.get("task")
    own = TASKS.load(task).label_names if task in TASKS.names() else None
    # Where a task has classes of its own, training does not ask what the user calls them.
    return own or values.get("data", {}).get("label_names")


def _configured(evaluated: EvaluatedModel, config: EvalConfig) -> list[str] | None:
    own = Pretrained(name=evaluated.model, trust_remote_code=config.trust_remote_code).config()
    by_id = getattr(own, "id2label", None) or {}
    names = [str(by_id[number]) for number in sorted(by_id)]
    if not labels_texts(own) or all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return None
    return names
