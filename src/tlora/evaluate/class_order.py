"""Map the outputs of a classifier to classes, from its run or its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlora.adapter.head import HEAD_FILE
from tlora.errors import ConfigError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel, labels_texts
from tlora.files import read_json
from tlora.models.pretrained import Pretrained
from tlora.registry import TASKS
from tlora.training.runfolder import RunFolder


def class_names(evaluated: EvaluatedModel, config: EvalConfig) -> list[str] | None:
    """Return a model's classes in the order of its outputs; None if unknown.

    The run's record takes precedence, and the user's `label_names` must not contradict it. Next
    come the user's names, then the model's configuration, if it has a head and real names rather
    than numbers ("LABEL_0").

    Raises:
        ConfigError: the user's order differs from that of training.
    """
    run, given = run_of(evaluated), config.data.label_names
    recorded = _recorded(run) if run else None
    if recorded and given and order_of(recorded, given) not in (None, [*range(len(given))]):
        raise ConfigError(
            f"{', '.join(given)} differs from the class order {evaluated.name} was trained with"
            f" ({', '.join(recorded)}); remove it.",
            where="data.label_names",
        )
    if given or recorded:
        return given or recorded
    # The base's configuration describes a head that the run has replaced.
    return None if run and evaluated.adapter else _configured(evaluated, config)


def order_of(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the index in ``names`` of each of ``wanted``; None if the classes differ.

    Ignores case, unless it distinguishes classes.
    """
    for same in (str, str.casefold):
        left, right = [same(name) for name in names], [same(name) for name in wanted]
        if len(set(left)) == len(left) == len(right) and set(left) == set(right):
            return [left.index(name) for name in right]
    return None


def run_of(evaluated: EvaluatedModel) -> RunFolder | None:
    """Return the run that contains a model or an adapter, final or as a checkpoint."""
    folder = Path(evaluated.path)
    for run in (RunFolder(folder.parent), RunFolder(folder.parent.parent)):
        if run.exists and folder in (run.adapter, run.checkpoints / folder.name):
            return run
    return None


def _recorded(run: RunFolder) -> list[str] | None:
    values = run.config()
    task = values.get("task")
    own = TASKS.load(task).label_names if task in TASKS.names() else None
    # If a task defines its classes, training ignores the user's names.
    return own or values.get("data", {}).get("label_names")


def _configured(evaluated: EvaluatedModel, config: EvalConfig) -> list[str] | None:
    file = Path(evaluated.adapter or "") / HEAD_FILE
    if evaluated.adapter and file.is_file():
        names = read_json(file)["id2label"]
        return [names[number] for number in sorted(names, key=int)]
    own = Pretrained(name=evaluated.model, trust_remote_code=config.trust_remote_code).config()
    by_id = getattr(own, "id2label", None) or {}
    names = [str(by_id[number]) for number in sorted(by_id)]
    # Numbers and numbered labels ("LABEL_0", "0") are not names.
    named = any(name not in (f"LABEL_{n}", str(n)) for n, name in enumerate(names))
    return names if named and labels_texts(own) else None
