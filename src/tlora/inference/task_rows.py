"""Rows of a registered task as an evaluation: a reply is right if it is the row's response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.metrics import mean

from tlora.errors import ConfigError, DataError
from tlora.evalconfig import EvalConfig
from tlora.evaluation.harness.base import Doc, Reading, ReplyTask
from tlora.evaluation.harness.rows import Source
from tlora.registry import TASKS
from tlora.tasks.base import Row, Task

_SPACE = 8  # tokens of white space and of the end


class ExactMatchTask(ReplyTask):
    """Rows of a task of prompts and responses; white space around a reply does not count.

    Args:
        name: what results call it.
        docs: "item", "prompt" and "target" of each row.
    """

    source = Source((), "rows given")
    protocol = "the reply is the row's response, white space at its ends aside; greedy"
    reads = "exact"
    stops = ()

    def __init__(self, name: str, docs: list[Doc]) -> None:
        self._docs = docs
        super().__init__(name)

    def generation(self) -> dict[str, Any]:
        """Greedily as far as the longest response could go, at a token a byte."""
        longest = max(len(doc["target"].strip().encode()) for doc in self._docs)
        return super().generation() | {"max_gen_toks": longest + _SPACE}

    def download(
        self, data_dir: str | None = None, cache_dir: str | None = None, download_mode: Any = None
    ) -> None:
        """Take the rows as they were given."""
        self.dataset = self._docs

    def doc(self, raw: Any, where: str) -> Doc:
        """Return a row as it was given."""
        return raw

    def read(self, docs: Sequence[Doc], replies: Sequence[Sequence[str]]) -> list[Reading]:
        """Compare the first reply to each doc."""
        read = []
        for doc, (reply, *_) in zip(docs, replies, strict=True):
            answer = reply.strip()
            right = answer == doc["target"].strip()
            read.append(Reading(reply, answer or None, {"exact_match": float(right)}))
        return read


class ReplyMetricsTask(ExactMatchTask):
    """Rows whose replies the task itself reads back and scores, as all of them together.

    Args:
        name: what results call it.
        docs: as of `ExactMatchTask`.
        task: its `reply_metrics` are the scores; where it has classes, accuracy is counted item
            by item besides.
    """

    protocol = "the reply is read back by the task and scored by its own metrics; greedy"
    reads = "task"

    def __init__(self, name: str, docs: list[Doc], task: Task) -> None:
        self._task_of_rows = task
        targets = [doc["target"] for doc in docs]
        self._own = tuple(task.reply_metrics(targets, targets))
        self._counted = ("accuracy",) if task.label_names else ()
        self.metrics = tuple(dict.fromkeys([*self._own, *self._counted]))
        super().__init__(name, docs)

    def read(self, docs: Sequence[Doc], replies: Sequence[Sequence[str]]) -> list[Reading]:
        """Note for each first reply whether it is the row's label."""
        return [
            Reading(
                reply,
                reply.strip() or None,
                dict.fromkeys(self._counted, float(reply.strip() == doc["target"])),
            )
            for doc, (reply, *_) in zip(docs, replies, strict=True)
        ]

    def process_results(self, doc: Doc, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what each score is made of: (reply, target), or a number of this row."""
        pair = (results[0]["reply"], doc["target"])
        return {**dict.fromkeys(self.metrics, pair), **results[0]["scores"]}

    def aggregation(self) -> dict[str, Callable[[list[Any]], float]]:
        """Return for each score the function that makes it of all rows."""

        def own(metric: str) -> Callable[[list[Any]], float]:
            return lambda pairs: self._task_of_rows.reply_metrics(*zip(*pairs, strict=True))[metric]

        return {name: mean if name in self._counted else own(name) for name in self.metrics}


def of_a_task(config: EvalConfig) -> bool:
    """Return whether the rows of a registered task are asked for, and not an evaluation's.

    Raises:
        ConfigError: they are not, and fields say how they are read.
    """
    if config.test_file or config.data.kind or config.data.dataset:
        return True
    if given := config.data.given():
        raise ConfigError(
            f"`data.{given[0]}` says how rows of yours are read, and evaluations have their own;"
            " give --test_file or --data.dataset too, or leave it out.",
            where="data",
        )
    return False


def of_task(config: EvalConfig) -> ExactMatchTask:
    """Make an evaluation of the prompts and responses of a registered task.

    Raises:
        ConfigError: there are several tasks, the name is not registered, its rows are not scored by
            their responses, or there are none.
        DataError: a row is not what the task expects.
    """
    if len(config.tasks) > 1:
        raise ConfigError(
            "--test_file, --data.dataset and --data.kind are of one task; give one.", where="tasks"
        )
    name = config.tasks[0]
    task = TASKS.load(name)(config.data)
    if task.kind in ("classification", "regression"):
        raise ConfigError(
            f"{name!r} has labels, and the models write texts; give models with a trained head,"
            " or --data.kind seq2seq where the task can be put as text to text.",
            where="tasks",
        )
    if not (task.exact or task.reads_replies):
        raise ConfigError(
            f"the rows of {name!r} are not scored by their responses; leave --test_file out for"
            " the evaluations that have a --data_dir.",
            where="test_file",
        )
    docs = []
    for number, row in enumerate(scored_rows(task, config)):
        if "prompt" not in row:
            raise DataError(
                f"{name}, row {number + 1}: no prompt and response, so no reply can be scored."
            )
        docs.append({"item": str(number), "prompt": row["prompt"], "target": row["response"]})
    return ReplyMetricsTask(name, docs, task) if task.reads_replies else ExactMatchTask(name, docs)


def scored_rows(task: Task, config: EvalConfig, limited: bool = False) -> list[Row]:
    """Return the rows to score: all, or if ``limited`` those that `limit` of the evaluation leaves.

    Raises:
        ConfigError: the task has no rows of its own, and none are named.
        DataError: a row is not what the task expects.
    """
    raw, where = task.held_out(config.test_file)
    if limited:
        raw = raw.select(range(config.limited(len(raw))))
    rows = [task.row(row, f"{where}, row {number + 1}") for number, row in enumerate(raw)]
    if not rows:
        raise DataError(f"{where}: there are no rows.")
    return rows
