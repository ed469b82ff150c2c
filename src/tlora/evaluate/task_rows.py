"""Evaluate on rows of a registered task, comparing replies with the rows' responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from lm_eval.api.filter import Filter
from lm_eval.api.task import ConfigurableTask

from tlora.errors import DataError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.loading import unheard
from tlora.evaluate.run_format import as_prompt
from tlora.scoring.closeness import ROUGE, chrf, rouge
from tlora.tasks.base import Row, Task
from tlora.tasks.rendering import stops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tlora.evaluations.utils import Doc, Reading

_GREEDY = {"do_sample": False, "temperature": 0.0}
_EQUALS = (
    "A reply is correct if it equals the row's response, ignoring spaces at the ends. Decoding is"
    " greedy."
)
_OF_TASK = "The task reads the reply and scores it by its own metrics. Decoding is greedy."
_SPACE = 8  # tokens for white space and EOS


class Exact(Filter):
    """Compare the first reply to each row with its response.

    Args:
        metrics: metrics that score an equal reply 1.
        close: whether to score the other replies by ROUGE.
    """

    def __init__(self, metrics: Sequence[str], close: bool = False) -> None:
        self.metrics, self.close = metrics, close

    def apply(self, resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[Reading]:
        """Return one reading per doc, ignoring white space around a reply."""
        readings = []
        for (reply, *_), doc in zip(resps, docs, strict=True):
            answer = reply.strip()
            target = doc["target"].strip()
            scores = dict.fromkeys(self.metrics, float(answer == target))
            if self.close:
                scores |= rouge(answer, target)
            readings.append({"reply": reply, "answer": answer or None, "scores": scores})
        return readings


def rows_task(
    name: str, docs: list[Doc], task: Task | None = None, until: Sequence[str] = ()
) -> ConfigurableTask:
    """Make an evaluation of rows.

    Args:
        name: its name in results.
        docs: its rows: "item", "prompt", "target".
        task: parses all replies and scores them with its `reply_metrics`, plus accuracy per row if
            it has classes. None: a reply is right if it equals the target, and ROUGE and chrF
            measure how close it is.
        until: stop sequences besides the EOS token.
    """
    targets = [doc["target"] for doc in docs]
    metrics: dict[str, Any]
    if task is None:
        reads, counted = "exact", ["exact_match"]
        protocol = _EQUALS
        metrics = dict.fromkeys((*counted, *ROUGE), "mean") | {"chrf": _chrf}
    else:
        reads, counted = "task", ["accuracy"] if task.label_names else []
        protocol = _OF_TASK
        metrics = {metric: _of_all(task, metric) for metric in task.reply_metrics(targets, targets)}
        metrics |= dict.fromkeys(counted, "mean")

    def scores(doc: Doc, results: list[Reading]) -> dict[str, Any]:
        return dict.fromkeys(metrics, (results[0]["reply"], doc["target"])) | results[0]["scores"]

    # Enough for the longest response at one token per byte.
    longest = max(len(target.strip().encode()) for target in targets) + _SPACE
    compared = {"function": Exact, "metrics": counted, "close": task is None}
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "generation_kwargs": _GREEDY | {"until": [*until], "max_gen_toks": longest},
        "filter_list": [{"name": reads, "filter": [compared]}],
        "process_results": scores,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": True}
            for metric, aggregation in metrics.items()
        ],
        "metadata": {"version": 1, "protocol": protocol},
    }
    with unheard("lm_eval"):  # it warns about rows that it did not load itself
        return ConfigurableTask(config=config)


def _chrf(pairs: list[tuple[str, str]]) -> float:
    replies, targets = zip(*pairs, strict=True)
    return chrf([reply.strip() for reply in replies], [target.strip() for target in targets])


def _of_all(task: Task, metric: str) -> Callable[[list[Any]], float]:
    """Return a function that scores all pairs of reply and target together."""
    return lambda pairs: task.reply_metrics(*zip(*pairs, strict=True))[metric]


def of_rows(
    name: str, rows: Sequence[Row], task: Task, tokenizer: PreTrainedTokenizerBase
) -> ConfigurableTask:
    """Make an evaluation of prompts and responses; in a chat, of the last answer.

    Raises:
        DataError: the chat template rejects a row.
    """
    docs = []
    for number, written in enumerate(rows):
        row = as_prompt(written, tokenizer)
        docs.append({"item": str(number), "prompt": row["prompt"], "target": row["response"]})
    chat = any("messages" in row for row in rows)
    until = stops(tokenizer) if chat else []
    return rows_task(name, docs, task if task.reads_replies else None, until)


def scored_rows(task: Task, config: EvalConfig, limited: bool = False) -> list[Row]:
    """Return the rows to score: all, or if ``limited``, as many as the evaluation's `limit`.

    Raises:
        ConfigError: no rows are given, and the task has no default dataset.
        DataError: a row does not fit the task.
    """
    raw, where = task.held_out(config.test_file)
    if limited:
        raw = raw.select(range(config.limited(len(raw))))
    rows = task.rows(raw, where)
    if not rows:
        raise DataError(f"{where}: there are no rows; give a source with rows.")
    return rows
