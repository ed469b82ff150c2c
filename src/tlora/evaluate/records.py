"""Convert the samples logged by lm-evaluation-harness into uniform records.

A record: {"item": text, "prompt", "reply", "answer" (or None), "target", "scores": {name: number}}.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Record = dict[str, Any]
Sample = Mapping[str, Any]


def records(task: Task, samples: Iterable[Sample]) -> list[Record]:
    """Return one record per item of a task, in order.

    Args:
        task: the task, ours or from lm-evaluation-harness.
        samples: its ``lm_eval.evaluate(..., log_samples=True)["samples"]``; a task with several
            filters has several samples per item.

    An item's scores have the metric's name, or "metric,filter" with several filters. Scores that
    are not a number for a single item (such as an F1's class and label) are dropped. The answer
    is the first filter's.
    """
    by_item: dict[Any, list[Sample]] = {}
    for sample in samples:
        by_item.setdefault(sample["doc_id"], []).append(sample)
    return [_record(task, by_item[item]) for item in sorted(by_item)]


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a task, named as in `records`, the main one first.

    Args:
        results: the task's ``lm_eval.evaluate(...)["results"]``.
    """
    found = {
        key: value
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
    filters = {key.partition(",")[2] for key in found}
    short = len(filters) == 1
    return {key.partition(",")[0] if short else key: float(v) for key, v in found.items()}


def _record(task: Task, samples: Sequence[Sample]) -> Record:
    first = samples[0]
    read = first["filtered_resps"][0]
    if isinstance(read, dict) and read.keys() >= {"reply", "answer", "scores"}:
        said = {"reply": read["reply"], "answer": read["answer"]}
        item, target = first["doc"]["item"], first["target"]
    else:
        said, target = _said(task, first)
        item = str(first["doc_id"])
    texts = [str(arguments[0]) for arguments in first["arguments"]]
    prompt = os.path.commonprefix(texts)  # noqa: RUF071 - of texts, character by character
    return {
        "item": item,
        "prompt": prompt,
        **said,
        "target": _text(target),
        "scores": _scores(samples),
    }


def _scores(samples: Sequence[Sample]) -> dict[str, float]:
    return {
        metric if len(samples) == 1 else f"{metric},{sample['filter']}": float(sample[metric])
        for sample in samples
        for metric in sample["metrics"]
        if isinstance(sample[metric], (bool, int, float))
    }


def _said(task: Task, sample: Sample) -> tuple[dict[str, Any], Any]:
    """Return the reply, answer and target for one of the harness' own tasks."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return _chosen(task, sample)
    if task.OUTPUT_TYPE != "generate_until":  # likelihood tasks generate nothing
        return {"reply": "", "answer": None}, sample["target"]
    answer = _text(sample["filtered_resps"][0])
    return {"reply": str(sample["resps"][0][0]), "answer": answer}, sample["target"]


def _chosen(task: Task, sample: Sample) -> tuple[dict[str, Any], Any]:
    """Return the likeliest option, by the sum over its tokens, as in "acc"."""
    options, found = task.doc_to_choice(sample["doc"]), likelihoods(task, sample)
    chosen = options[found.index(max(found))]
    right = [options[e] if isinstance(e, int) else str(e) for e in _gold(task, sample)]
    return {"reply": chosen, "answer": chosen}, " | ".join(right)


def likelihoods(task: Task, sample: Sample) -> list[float]:
    """Return the log-likelihood of each option of a choice."""
    # A mutual information metric appends requests without a prompt.
    options = task.doc_to_choice(sample["doc"])
    return [pair[0] for pair in sample["filtered_resps"][: len(options)]]


def right_options(task: Task, sample: Sample) -> list[int]:
    """Return the indices of the right options of a choice."""
    options = task.doc_to_choice(sample["doc"])
    return [e if isinstance(e, int) else options.index(str(e)) for e in _gold(task, sample)]


def _gold(task: Task, sample: Sample) -> list[Any]:
    # If the options are in the prompt, the index of the right one refers to them.
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    return gold if isinstance(gold, list) else [gold]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else str(value)
