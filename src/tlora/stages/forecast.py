"""What calibrating a loaded model will take, said before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlora.config import TLoraConfig, bytes_text
from tlora.runconfig import CalibrationConfig
from tlora.stages import dryrun

if TYPE_CHECKING:
    from torch import nn

    from tlora.stages.estimate import CalibrationEstimate


def forecast(
    model: nn.Module, options: TLoraConfig, batches: Any, calibration: CalibrationConfig
) -> CalibrationEstimate:
    """Predict calibration and planning of a loaded model, by a forward pass of shapes.

    Where the model does not run without numbers (it is quantised, or routes in a loop) the
    activations are guessed, as in the dry run.

    Args:
        model: with its weights; it is left as it was.
        options: the adapter.
        batches: calibration batches, dicts of tensors; the first is looked at.
        calibration: how many samples, and how many a batch.

    Raises:
        ConfigError: no module matches ``target_modules``.
    """
    from torch import Tensor

    from tlora.calibration.shapes import Untraceable, forward_of
    from tlora.calibration.targets import find_targets

    targets = find_targets(model, options)
    first = next(iter(batches))
    spec = {n: (tuple(v.shape), v.dtype) for n, v in first.items() if isinstance(v, Tensor)}
    rows = max((shape[0] * (shape[1] if shape[1:] else 1) for shape, _ in spec.values()), default=1)
    try:
        passed = forward_of(model, spec, targets)
    except Untraceable:
        passed = None
    modules = dryrun.module_shapes(targets, options, passed, rows)
    return dryrun.calibration_of(modules, dryrun.weights_of(model), passed, (calibration, options))


def sentence(estimate: CalibrationEstimate) -> str:
    """Say in a line what calibration holds, in how many passes, and the peak."""
    return (
        f"calibration: {estimate.strategy.summary()}; peak about {bytes_text(estimate.peak)} with"
        f" the model's {bytes_text(estimate.weights)}"
    )
