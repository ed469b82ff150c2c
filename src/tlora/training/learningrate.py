"""The default learning rate of a run: the method's value for the size of the model."""

from __future__ import annotations

import dataclasses
import logging

from tlora.methods.learningrates import base_parameters, default_learning_rate
from tlora.training.initialize import check_targets
from tlora.training.setup import Setup

logger = logging.getLogger(__name__)

LEARNING_RATE = "trainer.learning_rate"


def with_learning_rate(setup: Setup) -> Setup:
    """Return ``setup`` with a learning rate; a log line names it if it is the method's default.

    The model's parameters are counted from its configuration, and the target modules are looked up
    there; no weight is read.

    Raises:
        ConfigError: as `check_targets`.
    """
    from tlora.training.dryrun import on_meta

    config = setup.config
    model, _ = on_meta(config, setup.kind, setup.task.label_names)
    check_targets(setup.kind, setup.options, model)
    if "learning_rate" in config.trainer:
        return setup
    rate = default_learning_rate(setup.options, model, config.method)
    logger.info(
        "learning rate %g: the default of %r for a model of %s parameters, not tuned for this"
        " task; set it by --learning_rate, or let `tlora compare` choose one.",
        rate,
        config.method,
        f"{base_parameters(model):,}",
    )
    trainer = config.trainer | {"learning_rate": rate}
    config = dataclasses.replace(config, trainer=trainer)
    return dataclasses.replace(setup, config=config, settled=(LEARNING_RATE,))
