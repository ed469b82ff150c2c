"""What a user says of the judge. Nothing here imports anything heavy."""

from __future__ import annotations

import ipaddress
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

_OWNED = ("messages", "model", "stream", "n")
"""Fields of a request that cannot be set by `JudgeConfig.request`."""


@dataclass(kw_only=True)
class JudgeConfig:
    """Who grades chat answers: an endpoint that speaks OpenAI's chat completions."""

    url: str | None = None
    """Base address of the endpoint, such as https://api.openai.com/v1 or http://localhost:8000/v1;
    without it answers are written and can be judged later."""
    model: str | None = None
    """Name of the judge at that endpoint."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key, the only place it is read from; null, or a variable
    that is not set, sends none."""
    prompts: str | None = None
    """File with the judge's prompts in FastChat's form (judge_prompts.jsonl); by default our own
    wording of the same protocol, whose scores are not those of the published prompts."""
    temperature: float = 0.0
    """Temperature of the judge."""
    max_tokens: int = 2048
    """Most tokens of a judgement."""
    request: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request; null leaves a field out (max_tokens: null)."""
    concurrency: int = 8
    """Requests under way at a time."""
    timeout: float = 120.0
    """Seconds without an answer after which a request is tried again."""
    retries: int = 6
    """How often a request is tried again after 429, 5xx, a timeout or a broken answer."""
    cache: str | None = None
    """Folder that keeps judgements, so that none is paid for twice; by default `judgements` in the
    output folder."""
    price_in: float | None = None
    """Price of a million prompt tokens, in any currency, to report the cost."""
    price_out: float | None = None
    """Price of a million tokens of the judge's answers."""

    def faults(self) -> list[str]:
        """Return what is wrong with the values, a sentence each."""
        faults = []
        if (self.url is None) != (self.model is None):
            missing = "model" if self.model is None else "url"
            faults.append(f"`judge.{missing}` is missing; a judge has a url and a model.")
        if self.url is not None:
            faults += _url_faults(self.url)
        for name in ("max_tokens", "concurrency"):
            if (count := getattr(self, name)) < 1:
                faults.append(f"`judge.{name}` is {count!r}; give a whole number, 1 or more.")
        if not self.timeout > 0:
            faults.append(f"`judge.timeout` is {self.timeout!r}; give seconds above 0.")
        for name in ("retries", "temperature", "price_in", "price_out"):
            number = getattr(self, name)
            if number is not None and not number >= 0:
                faults.append(f"`judge.{name}` is {number!r}; give a number, 0 or more.")
        if (self.price_in is None) != (self.price_out is None):
            faults.append("give both of `judge.price_in` and `judge.price_out`, or neither.")
        faults += [
            f"`judge.request.{name}` is set by the evaluation itself; leave it out."
            for name in _OWNED
            if name in self.request
        ]
        return faults


def is_local(url: str) -> bool:
    """Whether ``url`` names this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url_faults(url: str) -> list[str]:
    # The address is written into results, so it must hold no secret.
    try:
        parts = urllib.parse.urlsplit(url)
        host, secret = parts.hostname, parts.username or parts.password or parts.query
        _ = parts.port  # raises, if it is none
    except ValueError:
        host, secret = None, None
    if secret:
        return [
            "`judge.url` holds a user name, a password or a query (not shown here); give the bare"
            " address, and the key in the variable that `judge.key_variable` names."
        ]
    if not host or parts.scheme not in ("http", "https"):
        return [f"`judge.url` is {url!r}; give an address such as http://localhost:8000/v1."]
    return []
