"""Grade many answers with one request per turn of a question, several in parallel.

Answers are lines as in an evaluation's folder: one per turn of each question, with everything that
judging needs.

Source: FastChat's summary of single-answer grades, published with arXiv 2306.05685: means over
graded answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tlora.errors import ArtifactError, JudgeError
from tlora.files import read_state, write_state
from tlora.scoring.mtbench.endpoint import Reply, completions_url, connected, request_body
from tlora.scoring.mtbench.judgeconfig import JudgeConfig
from tlora.scoring.mtbench.prompts import OURS, JudgePrompts, read_prompts
from tlora.scoring.mtbench.questions import Pair, Question

Line = dict[str, Any]
Lines = Sequence[Mapping[str, Any]]


def answer_lines(question: Question, replies: Pair, prompts: Pair) -> list[Line]:
    """Return the two lines of a question, without grades.

    Args:
        question: the question.
        replies: a model's replies to its two turns.
        prompts: the prompt of each turn.
    """
    return [
        {
            "item": f"{question.id}/{turn}",
            "group": question.id,
            "prompt": question.turns[turn - 1],
            "reply": replies[turn - 1],
            "answer": None,
            "target": question.references[turn - 1] if question.references else None,
            "scores": {},
            "turn": turn,
            "category": question.category,
            "rendered": prompts[turn - 1],
        }
        for turn in (1, 2)
    ]


def graded(line: Mapping[str, Any], reply: Reply) -> Line:
    """Add the judge's reply to the line of an answer."""
    scores = {} if reply.score is None else dict.fromkeys(_means_of(line), reply.score)
    return {**line, "scores": scores, "judgment": reply.text, "status": reply.status}


def _means_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the means that include the grade of one answer."""
    return ("score", f"turn_{line['turn']}", line["category"])


def metric_names(lines: Lines) -> list[str]:
    """Return the names of the scores: all answers, each turn, each category in the file's order."""
    names = [_means_of(line) for line in lines]
    return list(dict.fromkeys(name for column in zip(*names, strict=True) for name in column))


def means(lines: Lines) -> dict[str, float]:
    """Return the mean grade under each name of `metric_names`, 1 to 10.

    Omits a name without any graded answer.
    """
    grades = {n: [e["scores"][n] for e in lines if n in e["scores"]] for n in metric_names(lines)}
    return {name: math.fsum(some) / len(some) for name, some in grades.items() if some}


def counts(replies: Iterable[Reply]) -> dict[str, Any]:
    """Return the cost of judging, including cached judgments, as plain JSON values."""
    replies = list(replies)
    statuses = Counter(reply.status for reply in replies)
    return {
        "judgments": len(replies),
        "unrated": {name: n for name, n in sorted(statuses.items()) if name != "rated"},
        "tokens_in": sum(reply.tokens_in for reply in replies),
        "tokens_out": sum(reply.tokens_out for reply in replies),
    }


def judge_prompts(config: JudgeConfig) -> JudgePrompts:
    """Return the prompts selected by a configuration.

    Raises:
        DataError: the file of prompts is missing or damaged.
    """
    return read_prompts(config.prompts) if config.prompts else OURS


def judge(lines: Lines, config: JudgeConfig, kept: Path, title: str = "judging") -> list[Reply]:
    """Grade every answer, and return the judge's replies, one per line.

    Each reply is written to the folder ``kept`` at once, in a file named by a digest of the request
    (without the key), so that none is paid for twice: after an interruption, the same call only
    requests the rest.

    Args:
        lines: lines from `answer_lines`, question by question.
        config: the judge, with a url.
        kept: folder for judgments.
        title: label of the progress bar.

    Raises:
        ConfigError: the endpoint rejects the key, the model or the request.
        DataError: the file of prompts is missing or damaged.
        JudgeError: every try of a request failed; the other replies are kept.
    """
    prompts, url = judge_prompts(config), completions_url(config)
    bodies = [
        request_body(config, prompts.messages(first, second, turn))
        for first, second in zip(lines[::2], lines[1::2], strict=True)
        for turn in (1, 2)
    ]
    files = [kept / f"{_digest({'url': url, 'request': body})}.json" for body in bodies]
    missing = [each for each in zip(bodies, files, strict=True) if _reply_in(each[1]) is None]
    try:
        if missing:
            _ask(missing, config, title)
    except JudgeError as error:
        there = sum(file.is_file() for file in files)
        raise JudgeError(
            f"{there} of {len(bodies)} judgments are saved in {kept}; rerun the same command to"
            f" request the rest. The first failure: {error}"
        ) from error
    return [Reply(**read_state(file)["reply"]) for file in files]


def _ask(missing: list[tuple[dict[str, Any], Path]], config: JudgeConfig, title: str) -> None:
    """Send requests and write each reply to its file, until one fails."""
    with connected(config) as endpoint, ThreadPoolExecutor(config.concurrency) as pool:

        def ask(body: dict[str, Any], file: Path) -> None:
            reply = dataclasses.asdict(endpoint.request(body))
            write_state(file, {"url": completions_url(config), "request": body, "reply": reply})

        running = [pool.submit(ask, *each) for each in missing]
        try:
            for ended in tqdm(as_completed(running), total=len(running), desc=title, disable=None):
                ended.result()
        finally:
            # After a failure, running requests finish and are kept; waiting ones do not start.
            pool.shutdown(cancel_futures=True)


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _reply_in(file: Path) -> Reply | None:
    """Return a saved reply, or None if it is missing or its file is damaged."""
    try:
        return Reply(**read_state(file)["reply"])
    except (ArtifactError, KeyError, TypeError):
        return None
