"""Rows of a registered task, with or without prompts, as an evaluation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tlora.calibration.limits import within_positions
from tlora.errors import DataError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.harness_task import HarnessTask, TaskResult
from tlora.evaluate.likelihood import likelihood
from tlora.evaluate.preflight import replied_task
from tlora.evaluate.task_rows import of_rows, scored_rows
from tlora.tasks.base import LONGEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class WrittenRows:
    """Rows of a registered task: how likely a model finds them, and how close its replies come.

    Texts without prompts have the first alone. Of a chat the last answer is asked for, and all are
    scored by how likely they are.

    Args:
        config: the evaluation.
        tokenizer: its chat template writes the prompts, where one does.

    Raises:
        ConfigError: there are several tasks, the name is not registered, its rows are not scored by
            their responses, or there are none.
        DataError: a row is not what the task expects.
    """

    def __init__(self, config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._template = config, tokenizer.chat_template
        self._task = replied_task(config)
        self._asked_length = config.data.max_length
        self._task.settle(tokenizer.chat_template is not None, None)
        rows, name = scored_rows(self._task, config), config.tasks[0]
        self._rows = rows[: config.limited(len(rows))]
        self.items, self.shots = len(self._rows), 0
        # Tasks that read replies have scores of their own; vLLM keeps its model to itself.
        self._likely = not self._task.reads_replies and config.backend == "hf"
        self._replies = None
        texts = sum("text" in row for row in self._rows)
        if 0 < texts < len(self._rows):
            raise DataError(
                f"{config.test_file}: {texts} of {len(self._rows)} rows are plain text, the others"
                " have prompts; evaluate them separately."
            )
        if not texts:
            self._replies = HarnessTask(of_rows(name, rows, self._task, tokenizer), config)
        elif not self._likely:
            raise DataError(f"{name}: texts have a loss alone, which vLLM does not tell.")
        said = [self._replies.protocol] if self._replies else []
        said += ["loss in nats, by token, of what training would learn"] if self._likely else []
        self.protocol = "; ".join(said)

    def check(
        self, evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> None:
        """Check, before the model is loaded, that it can be asked.

        Raises:
            ConfigError: as `HarnessTask.check`.
        """
        if self._replies is not None:
            self._replies.check(evaluated, tokenizer, longest)
        if not self._asked_length:
            data = self._task.data
            data.max_length = min(data.max_length or LONGEST, longest)

    def evaluate(self, lm: Any) -> TaskResult:
        """Have the prompts answered, then score the rows themselves."""
        if self._replies is not None:
            found = self._replies.evaluate(lm)
        else:
            found = TaskResult(
                [_unasked(number, row["text"]) for number, row in enumerate(self._rows)], {}
            )
        if not self._likely:
            return found
        lm.tokenizer.chat_template = self._template
        size, data = self._config.batch_size, self._task.data
        data.max_length = within_positions(lm.model, data.max_length or LONGEST)
        scores = likelihood(lm.model, lm.tokenizer, self._rows, self._task, size)
        return dataclasses.replace(found, scores=found.scores | scores)


def _unasked(number: int, text: str) -> dict[str, Any]:
    """Return the line of a text that nothing was asked about."""
    item = {"item": str(number), "prompt": "", "reply": "", "answer": None}
    return item | {"target": text, "scores": {}}
