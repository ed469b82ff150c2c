"""Evaluate classification and regression models on the rows of a registered task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tlora.calibration.limits import within_positions
from tlora.errors import ConfigError
from tlora.evaluate.class_order import class_names, order_of
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.harness_task import TaskResult, with_odds
from tlora.evaluate.preflight import check_labeled_rows, labeled_task
from tlora.evaluate.task_rows import scored_rows
from tlora.models.pretrained import set_token_ids
from tlora.registry import TASKS
from tlora.tasks.base import LONGEST
from tlora.tasks.metrics import accuracy
from tlora.tasks.tokens import labeled, labeled_collator

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from tlora.calibration.kfac import ScoredBatch
    from tlora.evaluate.laplace import Laplace
    from tlora.tasks.dataconfig import DataConfig

_BATCH = 32


@dataclass(frozen=True)
class Labeler:
    """A loaded model with a head."""

    evaluated: EvaluatedModel
    """The model's entry in the evaluation."""
    model: Any
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        """Set the padding token by which decoders find the last token."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        set_token_ids(self.model.config, ["pad_token_id"], self.tokenizer.pad_token_id)


class Labels:
    """The rows of one task, and the class order of each model.

    Raises:
        ConfigError: the task is not registered or has no head, its classes are unknown, or there
            are no rows.
        DataError: a row does not fit the task.
    """

    shots = 0

    def __init__(self, name: str, config: EvalConfig, models: Sequence[EvaluatedModel]) -> None:
        self.name, self._config = name, config
        self._batch = config.batch_size if isinstance(config.batch_size, int) else _BATCH
        self.task = task = labeled_task(name, config)
        self._asked_length = config.data.max_length
        self._outputs: dict[str, list[str]] = {}
        if task.kind == "classification":
            found = {evaluated.name: class_names(evaluated, config) for evaluated in models}
            # A task without fixed classes uses those of the first model that names any; a model
            # without class names uses the task's.
            fixed = type(task).label_names
            task.label_names = task.label_names or next(filter(None, found.values()), None)
            self._outputs = {name: names or fixed or [] for name, names in found.items()}
            if not all(self._outputs.values()):
                raise ConfigError(
                    "the model's class order is unknown; list the classes in the order of"
                    " training with --data.label_names.",
                    where="data.label_names",
                )
        self._rows = scored_rows(self.task, config, limited=True)
        self.items = len(self._rows)
        summary = next(entry.summary for entry in TASKS.entries() if entry.name == name)
        self.protocol = f"{summary}; labeled by the model's head"
        self.has_odds = task.kind == "classification"

    @property
    def head(self) -> dict[str, Any]:
        """Model configuration fields that define the trained head."""
        return self.task.head

    def check(
        self, evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> None:
        """Check that a model has the task's classes; its head is checked at loading.

        Raises:
            ConfigError: it has other classes.
        """
        if (wanted := self.task.label_names) and self._order(evaluated.name) is None:
            raise ConfigError(
                f"{evaluated.name} has the classes {', '.join(self._outputs[evaluated.name])}, but"
                f" the task has {', '.join(wanted)}; use a model with the task's classes, or, if"
                " only the names differ, list the task's names in the order of the model's outputs"
                " in --data.label_names.",
                where="models",
            )
        if not self._asked_length:
            data = self.task.data
            data.max_length = min(data.max_length or LONGEST, longest)

    def _order(self, model: str) -> list[int] | None:
        """Return the index of the model output for each class of the task."""
        return order_of(self._outputs[model], self.task.label_names or [])

    def evaluate(self, lm: Labeler) -> TaskResult:
        """Label all rows, the longest first."""
        import numpy as np
        import torch

        longest = within_positions(lm.model, self.task.data.max_length or LONGEST)
        data = dataclasses.replace(self.task.data, max_length=longest)
        encoded = [labeled(lm.tokenizer, row, data) for row in self._rows]
        one_more = dataclasses.replace(data, max_length=longest + 1)
        truncated = sum(
            len(labeled(lm.tokenizer, row, one_more)["input_ids"]) > longest
            for row, found in zip(self._rows, encoded, strict=True)
            if len(found["input_ids"]) == longest
        )
        average = self._average(lm, data)
        logits: dict[int, Any] = {}
        for chosen, batch in self._batches(lm, encoded):
            if average is not None:
                found = torch.stack(average.logits(_scored(batch)))
            else:
                with torch.no_grad():
                    found = lm.model(**batch).logits.float()
            logits.update(zip(chosen, found.cpu().numpy(), strict=True))
        predictions = np.stack([logits[i] for i in range(self.items)])
        if self.task.label_names:
            predictions = predictions[:, self._order(lm.evaluated.name)]
        labels = np.array([row["label"] for row in self._rows])
        result = dataclasses.replace(self._answers(predictions, labels), truncated=truncated)
        if not self._config.laplace:
            return result
        return with_odds(result, [*predictions], [[label] for label in labels.tolist()])

    def _average(self, lm: Labeler, data: DataConfig) -> Laplace | None:
        """Return the Laplace approximation fitted to the training rows, if the model uses one."""
        if lm.evaluated.kind != "laplace":
            return None
        from tlora.evaluate.laplace import Laplace, training_rows

        average = Laplace(lm.evaluated, lm.model, self._config.seed)
        rows = training_rows(lm.evaluated, self.task, self._config.train_file)
        encoded = [labeled(lm.tokenizer, row, data) for row in rows]
        average.fit(_scored(batch) for _, batch in self._batches(lm, encoded))
        return average

    def _batches(
        self, lm: Labeler, encoded: list[dict[str, Any]]
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield batches of rows on the model's device, longest first, with their indices."""
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
        collate = labeled_collator(lm.tokenizer)
        for start in tqdm(range(0, len(order), self._batch), desc=self.name, disable=None):
            chosen = order[start : start + self._batch]
            batch = dict(collate([encoded[i] for i in chosen]))
            batch.pop("labels")  # the loss of some adapters cannot be computed outside of training
            yield chosen, {name: value.to(lm.model.device) for name, value in batch.items()}

    def _answers(self, predictions: np.ndarray, labels: np.ndarray) -> TaskResult:
        scores = self.task.metrics(predictions, labels)
        names = self.task.label_names
        if names:
            found = chosen = predictions.argmax(axis=-1)
            # A per-item score, so that every task has a score with an interval.
            scores = scores | {"accuracy": accuracy(chosen, labels)}
            replies = [(names[c], names[label]) for c, label in zip(chosen, labels, strict=True)]
        else:
            found = predictions.reshape(len(labels))
            replies = [(f"{v:.6g}", f"{label:g}") for v, label in zip(found, labels, strict=True)]
        lines = []
        for number, (row, (reply, target)) in enumerate(zip(self._rows, replies, strict=True)):
            pair = (row["text"], row["text_pair"])
            line = {
                "item": str(number),
                "prompt": "\n".join(text for text in pair if text is not None),
                "reply": reply,
                "answer": reply,
                "target": target,
                "scores": {"accuracy": float(reply == target)} if names else {},
                "predicted": found[number].item(),
                "label": labels[number].item(),
            }
            lines.append(line)
        return TaskResult(lines, scores)


def _scored(batch: dict[str, Any]) -> ScoredBatch:
    from tlora.calibration.kfac import ScoredBatch

    return ScoredBatch(batch, lambda output: output.logits.float(), [1] * len(batch["input_ids"]))


def make(config: EvalConfig, models: Sequence[EvaluatedModel]) -> dict[str, Labels]:
    """Return the tasks of an evaluation of these models with heads.

    Raises:
        ConfigError: a task is unknown, or the tasks have different heads.
        DataError: as `Labels`.
    """
    check_labeled_rows(config)
    tasks = {name: Labels(name, config, models) for name in config.tasks}
    if len({str(task.head) for task in tasks.values()}) > 1:
        raise ConfigError(
            f"{', '.join(tasks)} need different heads; evaluate them separately.",
            where="tasks",
        )
    return tasks
