"""Average predictions over the posterior of an adapter's weights.

Source: Laplace-LoRA, Yang et al., arXiv 2308.13111; docs/evaluation.md lists the differences.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from tlora.adapter.freeze import lora_layers
from tlora.calibration.kfac import ScoredBatch, covariances, curvatures
from tlora.errors import ConfigError
from tlora.evaluate.class_order import run_of
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.linalg.posterior import evidence_precision, predictive
from tlora.registry import METHODS, TASKS
from tlora.tasks.dataconfig import DataConfig
from tlora.training.continuing import freezes_a
from tlora.training.runconfig import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from tlora.tasks.base import Row, Task

logger = logging.getLogger(__name__)

_SAMPLES = 100_000
_FACTORS = ("lora_A", "lora_B")


class Laplace:
    """A Gaussian over the trained LoRA factors of a loaded adapter.

    Args:
        evaluated: the adapter; a factor that its run froze does not vary.
        model: the adapter on its base.
        seed: seed of the samples that predictions average, the same for all items.

    Raises:
        ConfigError: it has no supported factors.
    """

    def __init__(self, evaluated: EvaluatedModel, model: Any, seed: int) -> None:
        parts = _varying(evaluated)
        self._layers = {
            f"{name}.{part}": factor
            for name, layer in lora_layers(model)
            for part in parts
            if isinstance(factor := getattr(layer, part)["default"], torch.nn.Linear)
        }
        if not self._layers:
            raise ConfigError(
                f"{evaluated.path} has no LoRA factors A and B in Linear layers; remove --laplace.",
                where="laplace",
            )
        self._model, self._seed = model, seed
        self.precision = 0.0

    def fit(self, batches: Iterable[ScoredBatch]) -> None:
        """Measure the curvature on training rows, and set the prior precision by the evidence."""
        self._posterior = curvatures(self._model, self._layers, batches)
        norm = sum(layer.weight.double().square().sum().item() for layer in self._layers.values())
        eigenvalues = [layer.eigenvalues for layer in self._posterior.values()]
        self.precision = evidence_precision(eigenvalues, norm)
        logger.info("laplace: the prior's precision is %.4g.", self.precision)

    def logits(self, batch: ScoredBatch) -> list[Tensor]:
        """Return logits of each item's averaged probabilities, normalized like plain ones."""
        found, normals = [], {}
        pairs = covariances(self._model, self._layers, batch, self._posterior, self.precision)
        for logits, covariance in pairs:
            if len(logits) not in normals:
                normals[len(logits)] = self._normals(len(logits)).to(logits.device)
            chances = predictive(logits, covariance, normals[len(logits)])
            tiny = torch.finfo(chances.dtype).tiny
            found.append(chances.clamp_min(tiny).log() + logits.double().logsumexp(0))
        return found

    def _normals(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randn(_SAMPLES, count, generator=generator)


def training_rows(evaluated: EvaluatedModel, task: Task, file: str | None) -> list[Row]:
    """Return an adapter's training rows: from ``file``, else those recorded by its run.

    Args:
        evaluated: the adapter.
        task: the task being evaluated, which reads ``file``; its classes are the model's.
        file: files given by the user.

    Raises:
        ConfigError: there is neither a file nor a run.
        DataError: the rows can no longer be read.
    """
    run = run_of(evaluated)
    if not file and run is None:
        raise ConfigError(
            f"{evaluated.path} is not in a `tlora train` run, so its training rows are unknown;"
            " give --train_file.",
            where="laplace",
        )
    if not file and run is not None:
        values = run.config()
        file, data = values.get("train_file"), DataConfig.from_dict(values["data"])
        names, task = task.label_names, TASKS.load(values["task"])(data)
        task.label_names = names
    raw, _ = task.load(file, None)
    return task.rows(raw, file or "the training rows")


def _varying(evaluated: EvaluatedModel) -> tuple[str, ...]:
    run = run_of(evaluated)
    if run is None:
        return _FACTORS
    config = RunConfig.from_dict(run.config())
    method = METHODS.load(config.method)
    trains = method.traits.trains
    if trains == ("lora_A",):
        return trains
    core = not any(each.startswith("lora_A") for each in trains) and trains != ("lora_B",)
    return ("lora_B",) if core or freezes_a(method, config.options()) else _FACTORS
