"""Prompts and responses as an evaluation: a reply is right if it is the row's response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tlora.errors import ConfigError, DataError
from tlora.evaluation.harness.base import Doc, Reading, ReplyTask
from tlora.evaluation.harness.rows import Source
from tlora.tasks.base import Task

_SPACE = 8  # tokens of white space and of the end


class ExactRows(ReplyTask):
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


def from_file(name: str, task: Task, path: str) -> ExactRows:
    """Make an evaluation of the prompts and responses in a file.

    Args:
        name: the registered name of the task.
        task: reads the file, as in training.
        path: the file.

    Raises:
        ConfigError: the rows of this task are not scored by their responses.
        DataError: a row is not what the task expects.
    """
    if not task.exact:
        raise ConfigError(
            f"the rows of {name!r} are not scored by their responses; leave --test_file out for"
            " the evaluations that have a --data_dir.",
            where="test_file",
        )
    rows, _ = task.load(path, None)
    docs = []
    for number, raw in enumerate(rows):
        where = f"{path}, row {number + 1}"
        row = task.row(raw, where)
        if "prompt" not in row:
            raise DataError(f"{where} has no prompt and response, so no reply can be scored.")
        docs.append({"item": str(number), "prompt": row["prompt"], "target": row["response"]})
    return ExactRows(name, docs)
