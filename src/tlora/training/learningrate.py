"""The learning rate of a run that is given none: the method's default for the size of the model."""

from __future__ import annotations

import dataclasses
import logging

from tlora.methods.learningrates import base_parameters, default_learning_rate
from tlora.training.initialize import check_targets
from tlora.training.setup import Setup

logger = logging.getLogger(__name__)

LEARNING_RATE = "trainer.learning_rate"


def with_learning_rate(setup: Setup) -> Setup:
    """Return ``setup`` with a learning rate, which a line names where it is the method's default.

    The model's parameters are counted on its configuration, and the modules to adapt looked for; no
    weight is read.

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
