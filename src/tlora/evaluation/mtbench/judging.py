"""Grading many answers: each turn of each question is one request, several under way at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tlora.errors import ArtifactError, ConfigError, JudgeError
from tlora.evaluation.mtbench.config import JudgeConfig
from tlora.evaluation.mtbench.endpoint import (
    Endpoint,
    Reply,
    completions_url,
    connected,
    request_body,
)
from tlora.evaluation.mtbench.prompts import OURS, JudgePrompts, rating, read_prompts
from tlora.evaluation.mtbench.questions import Question
from tlora.files import read_json, write_json

TURNS = (1, 2)
_HOPELESS = 3


@dataclass(frozen=True)
class Answered:
    """A question and what a model wrote to its two turns."""

    question: Question
    answers: tuple[str, str]
    prompts: tuple[str, str] = ("", "")
    """What the model was given for each."""


@dataclass(frozen=True)
class Judgement:
    """What the judge said of one turn's answer."""

    score: float | None
    """1 to 10; None where no grade could be read: that answer counts in no mean."""
    status: str
    """"rated", or why there is no score: "declined" (the endpoint says so), "no rating" (no number
    in brackets, as in "I cannot judge this"), "cut off" (none before `judge.max_tokens`), or "out
    of range"."""
    reply: Reply
    """The judge's words and tokens."""


@dataclass(frozen=True)
class Judged:
    """The judgements of one model's answers, both turns of a question one after the other."""

    judgements: list[tuple[Judgement, Judgement]]
    asked: int
    """Requests that were answered now; the other judgements came from the cache."""
    retried: int
    """Tries that failed and were made again."""

    def counts(self, config: JudgeConfig) -> dict[str, Any]:
        """Return what the judging took, cached judgements included, as plain JSON values.

        The cost is None unless prices are given and every reply says its tokens.
        """
        replies = [each.reply for pair in self.judgements for each in pair]
        statuses = Counter(each.status for pair in self.judgements for each in pair)
        known = [r for r in replies if r.tokens_in is not None and r.tokens_out is not None]
        tokens_in = sum(r.tokens_in or 0 for r in known)
        tokens_out = sum(r.tokens_out or 0 for r in known)
        cost = None
        if config.price_in is not None and config.price_out is not None and known == replies:
            cost = (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6
        return {
            "judgements": len(replies),
            "asked_now": self.asked,
            "retried": self.retried,
            "unrated": {name: n for name, n in sorted(statuses.items()) if name != "rated"},
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "without_token_counts": len(replies) - len(known),
            "cost": cost,
        }


def judge_prompts(config: JudgeConfig) -> JudgePrompts:
    """Return the prompts that a configuration asks for.

    Raises:
        DataError: the file of prompts is missing or damaged.
    """
    return read_prompts(config.prompts) if config.prompts else OURS


def judge(
    answered: Sequence[Answered], config: JudgeConfig, cache: str | Path, title: str = "judging"
) -> Judged:
    """Have every answer graded, in two requests a question.

    What the judge has said is kept in the folder ``cache`` as it comes, so that after a failure
    or a kill the same call asks only for the rest.

    Args:
        answered: questions with their answers.
        config: the judge; has a url.
        cache: where judgements are kept.
        title: what the progress bar says.

    Raises:
        ConfigError: the endpoint refuses the key, the model or the request.
        DataError: the file of prompts is missing or damaged.
        JudgeError: some requests were answered in none of their tries; the others are kept.
    """
    prompts = judge_prompts(config)
    bodies = [
        request_body(config, prompts.messages(each.question, each.answers, turn))
        for each in answered
        for turn in TURNS
    ]
    kept = JudgementCache(cache)
    url = completions_url(config)
    replies = {index: kept.get(url, body) for index, body in enumerate(bodies)}
    missing = [index for index, reply in replies.items() if reply is None]
    asked, retried = [], 0
    if missing:
        work = _request_all([bodies[index] for index in missing], config, kept, title)
        asked, retried = _run(work)
        replies |= dict(zip(missing, asked, strict=True))
    judgements = [_read(reply) for reply in replies.values() if reply is not None]
    pairs = list(zip(judgements[::2], judgements[1::2], strict=True))
    return Judged(pairs, len(asked), retried)


async def _request_all(
    bodies: list[dict[str, Any]], config: JudgeConfig, cache: JudgementCache, title: str
) -> tuple[list[Reply], int]:
    async with connected(config) as endpoint:
        with tqdm(total=len(bodies), desc=title, disable=None) as bar:
            requests = _Requests(endpoint, cache, bar)
            tasks = [asyncio.ensure_future(requests.request(body)) for body in bodies]
            try:
                replies = await asyncio.gather(*tasks)
            except JudgeError:
                replies = []  # it is one of `requests.failures`
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    if requests.failures:
        raise JudgeError(
            f"of {len(bodies)} judgements {requests.made} were made, and are kept in {cache.path},"
            f" and {len(requests.failures)} failed; the same command asks for the rest. The first"
            f" failure: {requests.failures[0]}"
        )
    return [reply for reply in replies if reply is not None], endpoint.retried


class JudgementCache:
    """A folder of replies, one JSON file each, so that none is paid for twice.

    The name of a file is a digest of all that defines the request: address, model, messages,
    temperature, limits and whatever else is sent, but not the key. Processes may share a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def get(self, url: str, body: dict[str, Any]) -> Reply | None:
        """Return the reply to a request, or None if it has to be asked; so where it is damaged."""
        try:
            reply = Reply(**read_json(self._file(url, body))["reply"])
            return reply if isinstance(reply.text, str) else None
        except (ArtifactError, KeyError, TypeError):
            return None

    def put(self, url: str, body: dict[str, Any], reply: Reply) -> None:
        """Keep a reply."""
        saved = {"url": url, "request": body, "reply": dataclasses.asdict(reply)}
        write_json(self._file(url, body), saved)

    def _file(self, url: str, body: dict[str, Any]) -> Path:
        text = json.dumps({"url": url, "request": body}, sort_keys=True)
        return self.path / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


class _Requests:
    """What the requests under way share."""

    def __init__(self, endpoint: Endpoint, cache: JudgementCache, bar: Any) -> None:
        self.endpoint, self.cache, self.bar = endpoint, cache, bar
        self.failures: list[JudgeError] = []
        self.made = 0
        self._in_a_row = 0
        self._over = False
        self._places = asyncio.Semaphore(endpoint.config.concurrency)

    async def request(self, body: dict[str, Any]) -> Reply | None:
        """Return the reply, kept on disk; None if there was none and others may fare better.

        Raises:
            ConfigError: the endpoint refuses the request, and would refuse the others.
            JudgeError: so many requests in a row have failed that none is likely to fare better.
        """
        async with self._places:
            if self._over:
                return None
            try:
                reply = await self.endpoint.request(body)
            except ConfigError:
                self._over = True
                raise
            except JudgeError as error:
                self.failures.append(error)
                self._in_a_row += 1
                self._over = self._in_a_row >= max(self.endpoint.config.concurrency, _HOPELESS)
                if self._over:
                    raise
                return None
        self._in_a_row = 0
        self.cache.put(completions_url(self.endpoint.config), body, reply)
        self.made += 1
        self.bar.update()
        return reply


def _read(reply: Reply) -> Judgement:
    score = rating(reply.text)
    if reply.finish in ("refusal", "content_filter"):
        return Judgement(None, "declined", reply)
    if score is None:
        return Judgement(None, "cut off" if reply.finish == "length" else "no rating", reply)
    if not 1 <= score <= 10:
        return Judgement(None, "out of range", reply)
    return Judgement(score, "rated", reply)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, in a notebook too, whose thread already has an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
