"""Classification and regression: a model with a head labels the rows of a registered task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError
from tlora.evaluate.class_order import Outputs, chosen_order, outputs_of
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.harness_task import TaskResult
from tlora.evaluate.task_rows import scored_rows
from tlora.registry import CONVERSATIONS, EVALUATIONS, TASKS
from tlora.tasks.base import Task
from tlora.tasks.metrics import accuracy
from tlora.tasks.tokens import labelled, labelled_collator

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

_BATCH = 32


@dataclass(frozen=True)
class Labeller:
    """A loaded model with a head."""

    name: str
    """What the evaluation calls it."""
    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @classmethod
    def of(
        cls, name: str, model: Any, tokenizer: PreTrainedTokenizerBase, config: EvalConfig
    ) -> Labeller:
        """Return the labeller of an evaluation; decoders find the last token by the padding."""
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        size = config.batch_size if isinstance(config.batch_size, int) else _BATCH
        return cls(name, model, tokenizer, size)


class Labels:
    """The rows of one task, and which output of each model is which of its classes.

    Raises:
        ConfigError: it is no registered task with a head, nothing names its classes, or there are
            no rows.
        DataError: a row is not what the task expects.
    """

    shots = 0

    def __init__(self, name: str, config: EvalConfig, models: Sequence[EvaluatedModel]) -> None:
        self.name = name
        asks = name in (*EVALUATIONS.names(), *CONVERSATIONS.names())
        task = None if asks else TASKS.load(name)(config.data)
        if task is None or task.kind not in ("classification", "regression"):
            raise ConfigError(
                f"{name!r} asks for text, and the models label it; see `tlora list tasks`.", "tasks"
            )
        self.task: Task = task
        self._given, self._fixed = config.data.label_names, bool(type(task).label_names)
        self._outputs: dict[str, Outputs] = {}
        self._orders: dict[str, list[int]] = {}
        if task.kind == "classification":
            self._outputs = {evaluated.name: outputs_of(evaluated, config) for evaluated in models}
            # A task that leaves its classes open has those of the first model that names them.
            told = (found.names for found in self._outputs.values() if found.names)
            task.label_names = task.label_names or next(told, None)
            if not task.label_names:
                raise ConfigError("name the classes in the order of training.", "data.label_names")
        self._rows = scored_rows(self.task, config, limited=True)
        self.items = len(self._rows)
        summary = next(entry.summary for entry in TASKS.entries() if entry.name == name)
        self.protocol = f"{summary}; labelled by the model's head"

    @property
    def head(self) -> dict[str, Any]:
        """Fields of a model's configuration that give it the head that was trained."""
        return self.task.head

    def check(
        self, evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> None:
        """Settle which output of a model is which class; the head itself shows when it is loaded.

        Raises:
            ConfigError: nothing tells the order, or the model's classes are not those of the task.
        """
        if self.task.label_names:
            self._orders[evaluated.name] = chosen_order(
                evaluated,
                self._outputs[evaluated.name],
                self.task.label_names,
                self._given,
                self._fixed,
            )

    def evaluate(self, lm: Labeller, progress: Callable[[int], None]) -> TaskResult:
        """Label all rows, the longest first.

        Args:
            lm: the model.
            progress: called with the number of rows labelled so far.
        """
        import numpy as np
        import torch

        data = self.task.data
        encoded = [labelled(lm.tokenizer, row, data) for row in self._rows]
        order = sorted(range(self.items), key=lambda i: -len(encoded[i]["input_ids"]))
        collate = labelled_collator(lm.tokenizer)
        logits: dict[int, Any] = {}
        for start in range(0, self.items, lm.batch_size):
            chosen = order[start : start + lm.batch_size]
            batch = dict(collate([encoded[i] for i in chosen]))
            batch = {name: value.to(lm.model.device) for name, value in batch.items()}
            batch.pop("labels")  # the loss of some adapters cannot be computed outside of training
            with torch.no_grad():
                found = lm.model(**batch).logits.float().cpu().numpy()
            logits.update(zip(chosen, found, strict=True))
            progress(len(logits))
        predictions = np.stack([logits[i] for i in range(self.items)])
        if self.task.label_names:
            predictions = predictions[:, self._orders[lm.name]]
        labels = np.array([row["label"] for row in self._rows])
        return self._answers(predictions, labels)

    def _answers(self, predictions: np.ndarray, labels: np.ndarray) -> TaskResult:
        scores = self.task.metrics(predictions, labels)
        names = self.task.label_names
        if names:
            found = chosen = predictions.argmax(axis=-1)
            # What is counted item by item, so that every task has a score with an interval.
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


def make(config: EvalConfig, models: Sequence[EvaluatedModel]) -> dict[str, Labels]:
    """Return the tasks of an evaluation of these models with heads.

    Raises:
        ConfigError: a name is no such task, or the tasks have different heads.
        DataError: as `Labels`.
    """
    if (config.test_file or config.data.dataset) and len(config.tasks) > 1:
        flag = "--test_file" if config.test_file else "--data.dataset"
        raise ConfigError(f"{flag} is of one task; give one.", where="tasks")
    tasks = {name: Labels(name, config, models) for name in config.tasks}
    if len({str(task.head) for task in tasks.values()}) > 1:
        raise ConfigError(
            f"{', '.join(tasks)} have different heads, and a model has one; evaluate them apart.",
            where="tasks",
        )
    return tasks
