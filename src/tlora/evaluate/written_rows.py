"""Evaluate on rows of a registered task, with or without prompts."""

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
    """Rows of a registered task, scored by their likelihood and by replies to their prompts.

    Texts without prompts only have a likelihood. In a chat, the model generates the last answer,
    and the likelihood covers all answers.

    Args:
        config: the evaluation.
        tokenizer: its chat template formats the prompts, if they use one.

    Raises:
        ConfigError: there are several tasks, the name is not registered, the task does not score
            responses, or there are no rows.
        DataError: a row does not fit the task.
    """

    def __init__(self, config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._template = config, tokenizer.chat_template
        self._task = replied_task(config)
        self._asked_length = config.data.max_length
        self._task.settle(tokenizer.chat_template is not None, None)
        rows, name = scored_rows(self._task, config), config.tasks[0]
        self._rows = rows[: config.limited(len(rows))]
        self.items, self.shots = len(self._rows), 0
        # Tasks that parse replies have their own scores; vLLM does not expose its model.
        self._likely = not self._task.reads_replies and config.backend == "hf"
        self._replies = None
        texts = sum("text" in row for row in self._rows)
        if 0 < texts < len(self._rows):
            raise DataError(
                f"{config.test_file}: {texts} of {len(self._rows)} rows are plain text and the"
                " others have prompts; evaluate them separately."
            )
        if not texts:
            self._replies = HarnessTask(of_rows(name, rows, self._task, tokenizer), config)
        elif not self._likely:
            raise DataError(
                f"{name}: plain text is only scored by its loss, which vLLM does not compute;"
                " remove --backend."
            )
        said = [self._replies.protocol] if self._replies else []
        loss = "Loss is in nats per token, over the tokens that training learns."
        said += [loss] if self._likely else []
        self.protocol = " ".join(said)

    def check(
        self, evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> None:
        """Check before loading the model that it supports the rows.

        Raises:
            ConfigError: as `HarnessTask.check`.
        """
        if self._replies is not None:
            self._replies.check(evaluated, tokenizer, longest)
        if not self._asked_length:
            data = self._task.data
            data.max_length = min(data.max_length or LONGEST, longest)

    def evaluate(self, lm: Any) -> TaskResult:
        """Generate replies to the prompts, then score the rows themselves."""
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
    """Return the sample line of a text without a prompt."""
    item = {"item": str(number), "prompt": "", "reply": "", "answer": None}
    return item | {"target": text, "scores": {}}
