"""Configuration of the judge. Nothing here imports anything heavy."""

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
"""Request fields that `JudgeConfig.request` cannot set."""


@dataclass(kw_only=True)
class JudgeConfig(Section):
    """The judge of chat answers: an OpenAI-compatible chat completions endpoint."""

    where: ClassVar[str] = "judge"
    prefix: ClassVar[str] = "judge."

    url: str | None = None
    """Base URL of the endpoint, such as https://api.openai.com/v1 or http://localhost:8000/v1;
    without it, answers are saved and can be judged later."""
    model: str | None = None
    """Model name of the judge at that endpoint."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable with the API key, the only source of the key; null or an unset variable
    sends no key."""
    prompts: str | None = None
    """File with the judge's prompts in FastChat's format (judge_prompts.jsonl); by default, our own
    wording of the same protocol, whose scores are not comparable to the published prompts."""
    temperature: Annotated[float, at_least(0)] = 0.0
    """Temperature of the judge."""
    max_tokens: Annotated[int, at_least(1)] = 2048
    """Maximum tokens of a judgment."""
    request: dict[str, Any] = field(default_factory=dict)
    """Additional fields of every request; null omits a field (max_tokens: null)."""
    concurrency: Annotated[int, at_least(1)] = 8
    """Number of parallel requests."""
    timeout: Annotated[float, POSITIVE] = 120.0
    """Timeout in seconds before retrying a request."""
    retries: Annotated[int, at_least(0)] = 6
    """Maximum retries of a request after 429, 5xx, a timeout or a lost connection."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields, and in the URL."""
        if (self.url is None) != (self.model is None):
            missing = "model" if self.model is None else "url"
            yield f"`judge.{missing}` is missing; a judge has a url and a model."
        if self.url is not None:
            yield from _url_faults(self.url)
        if self.key_variable and not _VARIABLE.fullmatch(self.key_variable):
            yield (
                "`judge.key_variable` is not a variable name (not shown here, as it may be the"
                " key); give the name of the environment variable with the key."
            )
        for name in _OWNED:
            if name in self.request:
                yield f"the evaluation sets `judge.request.{name}` itself; remove it."


def is_local(url: str) -> bool:
    """Whether ``url`` names this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url_faults(url: str) -> list[str]:
    # Results include the URL, so it must not contain secrets.
    try:
        parts = urllib.parse.urlsplit(url)
        host, secret = parts.hostname, parts.username or parts.password or parts.query
        _ = parts.port  # raises if invalid
    except ValueError:
        host, secret = None, None
    if secret:
        return [
            "`judge.url` contains a user name, password or query (not shown here); give the bare"
            " URL, and the key in the variable named by `judge.key_variable`."
        ]
    if not host or parts.scheme not in ("http", "https"):
        return [f"`judge.url` is {url!r}; give an address such as http://localhost:8000/v1."]
    return []
