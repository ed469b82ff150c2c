"""What a user says of the judge. Nothing here imports anything heavy."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from tlora.checks import POSITIVE, Section, at_least

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWNED = ("messages", "model", "stream", "n")
"""Fields of a request that cannot be set by `JudgeConfig.request`."""


@dataclass(kw_only=True)
class JudgeConfig(Section):
    """Who grades chat answers: an endpoint that speaks OpenAI's chat completions."""

    where: ClassVar[str] = "judge"
    prefix: ClassVar[str] = "judge."

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
    temperature: Annotated[float, at_least(0)] = 0.0
    """Temperature of the judge."""
    max_tokens: Annotated[int, at_least(1)] = 2048
    """Most tokens of a judgment."""
    request: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request; null leaves a field out (max_tokens: null)."""
    concurrency: Annotated[int, at_least(1)] = 8
    """Requests under way at a time."""
    timeout: Annotated[float, POSITIVE] = 120.0
    """Seconds without an answer after which a request is tried again."""
    retries: Annotated[int, at_least(0)] = 6
    """How often a request is tried again after 429, 5xx, a timeout or a lost connection."""

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields, and with the address."""
        if (self.url is None) != (self.model is None):
            missing = "model" if self.model is None else "url"
            yield f"`judge.{missing}` is missing; a judge has a url and a model."
        if self.url is not None:
            yield from _url_faults(self.url)
        if self.key_variable and not _VARIABLE.fullmatch(self.key_variable):
            yield (
                "`judge.key_variable` is no name of a variable (not shown here, as it may be the"
                " key); name the environment variable that holds the key."
            )
        for name in _OWNED:
            if name in self.request:
                yield f"`judge.request.{name}` is set by the evaluation itself; leave it out."


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
