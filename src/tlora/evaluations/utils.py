"""Functions for the YAML files: convert rows to docs, replies to answers, answers to scores.

A doc is {"item": name of the row, "prompt", "target"}; a filter turns the replies to all docs into
readings, {"reply": the scored reply, "answer": its answer or None, "scores"}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.filter import Filter
from tqdm import tqdm

from tlora.errors import DataError
from tlora.evaluations.rows import Raw, Source
from tlora.scoring.answers import MARK, PROTOCOLS, after_mark, math_answer, math_verdicts
from tlora.scoring.latex import boxed
from tlora.scoring.pass_at_k import truncated
from tlora.scoring.symbolic import MathVerify
from tlora.tasks.base import text_of
from tlora.tasks.commonsense import Commonsense
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.gsm8k import Gsm8k
from tlora.tasks.math import Math

Doc = dict[str, str]
Reading = dict[str, Any]
Given = dict[str, Any]
"""`dataset_kwargs` and `metadata` of a YAML, including metadata from the command line."""

STOPS = ("### Instruction:",)


def documents(
    given: Given,
    doc: Callable[[Raw, str], Doc],
    column: str | None = None,
    keep: Callable[[Raw], bool] | None = None,
) -> dict[str, Dataset]:
    """Return the docs of an evaluation, as its only split, "test".

    Args:
        given: `files`, `origin`, and optionally `hub`, `configs` and `data_dir`; see `Source`.
        doc: makes {"prompt", "target"} from a raw row and its name in messages.
        column: column with row names, if distinct; otherwise a row's name is its number.
        keep: whether a row belongs to the evaluation; by default all do.

    Raises:
        DataError: rows are missing or invalid.
    """
    name = Path(given.get("config_source", "the evaluation")).stem
    place, rows = Source.of(given).rows(name, given.get("data_dir"))
    raws = [(i, raw) for i, raw in enumerate(rows) if keep is None or keep(raw)]
    if not raws:
        raise DataError(f"{place}: none of the rows belong to {name}; download its own file.")
    names = {str(raw[column]) for _, raw in raws if column and raw.get(column) is not None}
    distinct = len(names) == len(raws)
    return {
        "test": Dataset.from_list(
            [
                {
                    "item": str(raw[column] if distinct and column else i),
                    **doc(raw, f"{place}, row {i + 1}"),
                }
                for i, raw in raws
            ]
        )
    }


def gsm8k(**given: Any) -> dict[str, Dataset]:
    """Return GSM8K's docs: the training task's prompt, and the number of its answer."""

    def doc(raw: Raw, where: str) -> Doc:
        row = Gsm8k(DataConfig()).row(raw, where)
        return {"prompt": row["prompt"], "target": row["response"].rpartition(MARK)[2]}

    return documents(given, doc)


def math(**given: Any) -> dict[str, Dataset]:
    """Return MATH's docs: the training task's prompt, and the content of the last box."""

    def doc(raw: Raw, where: str) -> Doc:
        problem, solution = text_of(raw, "problem", where), text_of(raw, "solution", where)
        target = str(raw.get("answer", boxed(solution)) or "")
        if not target:
            raise DataError(f"{where}: column 'solution' has no \\boxed answer; drop the row.")
        row = Math(DataConfig()).row({"instruction": problem, "output": solution}, where)
        return {"prompt": row["prompt"], "target": target}

    return documents(given, doc, column="unique_id")


def word_problems(rule: str, **given: Any) -> dict[str, Dataset]:
    """Return the docs of word problems, ignoring the model-written and often wrong `output`."""

    def doc(raw: Raw, where: str) -> Doc:
        prompt = Math(DataConfig()).row(raw, where)["prompt"]
        return {"prompt": prompt, "target": _target(raw, rule, where)}

    return documents(given, doc)


def commonsense(rule: str, **given: Any) -> dict[str, Dataset]:
    """Return the docs of a commonsense set: the training task's prompt, and the right choice."""

    def doc(raw: Raw, where: str) -> Doc:
        prompt = Commonsense(DataConfig()).row(raw, where)["prompt"]
        return {"prompt": prompt, "target": _target(raw, rule, where)}

    return documents(given, doc)


def _target(raw: Raw, rule: str, where: str) -> str:
    target = text_of(raw, "answer", where)
    if not PROTOCOLS[rule].score(target, target):
        raise DataError(
            f"{where}: column 'answer' is {target!r}, which {rule} cannot read; check that the file"
            " belongs to this data set."
        )
    return target


class Answer(Filter):
    """Reads the first reply to each doc by one of the protocols.

    Args:
        rule: name of the protocol in `tlora.scoring.answers.PROTOCOLS`.
        stops: stop sequences, in case the model did not stop there.
    """

    def __init__(self, rule: str, stops: Sequence[str] = STOPS) -> None:
        self.protocol, self.stops = PROTOCOLS[rule], stops

    def apply(self, resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[Reading]:
        """Return a reading for each doc."""
        return [self._read(first, doc) for (first, *_), doc in zip(resps, docs, strict=True)]

    def _read(self, reply: str, doc: Doc) -> Reading:
        reply = truncated(reply, self.stops)
        answer = self.protocol.extract(reply)
        right = answer is not None and self.protocol.correct(answer, doc["target"])
        return {"reply": reply, "answer": answer, "scores": {"exact_match": float(right)}}


class MathAnswer(Filter):
    """Scores the first reply to each problem of MATH by both rules."""

    def apply(self, resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[Reading]:
        """Return a reading for each doc."""
        with MathVerify() as verifier:
            pairs = zip(resps, docs, strict=True)
            bar = tqdm(pairs, total=len(docs), desc="answers", disable=None)
            return [self._read(truncated(first, STOPS), doc, verifier) for (first, *_), doc in bar]

    @staticmethod
    def _read(reply: str, doc: Doc, verifier: MathVerify) -> Reading:
        verdicts = math_verdicts(reply, doc["target"], verifier)
        scores = {
            # The published rule has no box.
            "exact_match": float(verdicts["string"] and after_mark(reply) is not None),
            "math_verify": float(verdicts["symbolic"]),
        }
        return {"reply": reply, "answer": math_answer(reply), "scores": scores}


def scores(doc: Doc, results: list[Reading]) -> dict[str, float]:
    """Return the scores of one doc."""
    return dict(results[0]["scores"])
