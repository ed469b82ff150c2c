"""Settings shared by all runs of a comparison, which are part of their names."""

from __future__ import annotations

import dataclasses
from typing import Any

from tlora.compare import defaults as comparedefaults
from tlora.compare.compareconfig import EXACT_MATCH, CompareConfig
from tlora.registry import TASKS
from tlora.training import arguments
from tlora.training.digests import input_digest, model_identity
from tlora.training.kinds import KINDS
from tlora.training.runconfig import SharedConfig


def row_files(config: CompareConfig) -> dict[str, str | None]:
    """Return the digests of the files of rows; None of one that is missing."""
    held = config.validation if isinstance(config.validation, str) else None
    files = {"train_file": config.train_file, "test_file": config.test_file, "validation": held}
    return {name: input_digest(path) for name, path in files.items() if path}


def experiment(config: CompareConfig) -> dict[str, Any]:
    """Return the shared settings of all runs as plain JSON values.

    Files are identified by their content; settings are included if they differ from the tables in
    `tlora.compare.defaults`.
    """
    values = config.to_dict()
    shared = {field.name: values[field.name] for field in dataclasses.fields(SharedConfig)}
    for name in ("model", "train_file", "adapter", "trainer"):
        del shared[name]
    if shared["data"]["overlap"] != "drop":
        # Refusing or allowing rows does not affect a run that takes place.
        del shared["data"]["overlap"], shared["data"]["guard"]
    del shared["data"]["guard_dir"]
    if template := config.data.chat_template:
        shared["data"]["chat_template"] = input_digest(template) or template
    shared = comparedefaults.differing(shared, comparedefaults.SHARED)
    if trainer := _trainer(config):
        shared["trainer"] = trainer
    held_out = {"validation": config.validation, "validation_seed": config.validation_seed}
    split = held_out if not isinstance(config.validation, str) else {}
    # Every run has the other scores; answers are only generated if they are the metric.
    written = {"metric": EXACT_MATCH} if config.writes_answers else {}
    return (
        shared
        | {"model": model_identity(config.model), "files": row_files(config)}
        | split
        | written
    )


def _trainer(config: CompareConfig) -> dict[str, Any]:
    """Return the training arguments set in `trainer`, and others that differ from the table."""
    before = comparedefaults.TRAINER
    current = arguments.defaults(KINDS[TASKS.load(config.task)(config.data).kind])
    current = {name: value for name, value in current.items() if name in before}
    found = comparedefaults.differing(current | config.trainer_defaults, before)
    for name in [name for name, value in found.items() if not value and not before.get(name, True)]:
        # None, False and 0 all mean off; `bf16` None depends on the hardware, which runs record.
        del found[name]
    return found | config.trainer
