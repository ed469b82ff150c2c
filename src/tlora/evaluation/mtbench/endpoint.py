"""One question to an endpoint that speaks OpenAI's chat completions, asked until it is answered.

What fails for a while (429, 5xx, timeouts, cut connections, answers that are no JSON) is tried
again after a wait that doubles, or as long as the endpoint asks for by Retry-After; while one
request waits for that, the others do too. What would fail again (a wrong key, an unknown model) is
an error at once.

The key is read from the environment, sent in a header, and taken out of whatever the endpoint says
before anyone sees it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import os
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, JudgeError
from tlora.evaluation.mtbench.config import JudgeConfig, is_local

if TYPE_CHECKING:
    import httpx2

_PASSING = (408, 409, 425, 429)
"""Client errors that go away by themselves; so do all from 500 on."""
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
_LONGEST_REQUESTED_WAIT = 3600.0
_EXCERPT = 300
_SHORTEST_SECRET = 8
"""Shorter keys are fillers ("EMPTY", "none") for servers that check none."""


@dataclass(frozen=True)
class Reply:
    """What came back for a request."""

    text: str
    """The judge's words; empty if it gave none."""
    finish: str
    """Why it stopped: "stop", "length", "content_filter", or "refusal" where the endpoint says that
    the judge declined; "" if not said."""
    tokens_in: int | None
    """Tokens of the prompt, as the endpoint counts them; None if it does not."""
    tokens_out: int | None
    """Tokens of the answer, likewise."""


class _TryAgain(Exception):
    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def read_key(config: JudgeConfig) -> str | None:
    """Return the key from the environment, or None where there is none.

    Raises:
        ConfigError: it cannot be sent in a header, or would travel unencrypted to another machine.
    """
    name = config.key_variable
    key = os.environ.get(name, "").strip() if name else ""
    if not key:
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"the key in {name} has characters that no header can carry; set it again.", "judge"
        )
    url = config.url or ""
    if url.startswith("http:") and not is_local(url):
        raise ConfigError(
            f"the key in {name} would travel unencrypted to {url}; give an https address, or send"
            " no key by `judge.key_variable: null`.",
            where="judge",
        )
    return key


@dataclass
class Endpoint:
    """A judge's address, to be used from one event loop; `retried` counts tries that failed."""

    config: JudgeConfig
    client: httpx2.AsyncClient = field(repr=False)
    key: str | None = field(repr=False)
    retried: int = 0
    _pause_until: float = 0.0

    @property
    def url(self) -> str:
        """The address that requests go to."""
        return completions_url(self.config)

    async def ask(self, body: dict[str, Any]) -> Reply:
        """Send one request, and again where that may help.

        Raises:
            ConfigError: the endpoint refuses the key, the model or the request.
            JudgeError: it did not answer in any of the tries.
        """
        tries = self.config.retries + 1
        wait = _FIRST_WAIT
        for left in reversed(range(tries)):
            while (pause := self._pause_until - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            try:
                return await self._once(body)
            except _TryAgain as failure:
                self.retried += 1
                if not left or (failure.wait or 0) > _LONGEST_REQUESTED_WAIT:
                    raise JudgeError(
                        f"{self.url} gave no judgement (tries: {tries - left}): {failure}"
                    ) from None
                if failure.wait is not None:
                    self._pause_until = max(self._pause_until, time.monotonic() + failure.wait)
                else:
                    # Spread out, so that requests that failed together do not return together.
                    await asyncio.sleep(wait * random.uniform(0.5, 1.0))
                    wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("unreachable")

    async def _once(self, body: dict[str, Any]) -> Reply:
        import httpx2

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            # The client's own timeout is one for each read: a slow trickle would never end.
            async with asyncio.timeout(self.config.timeout):
                response = await self.client.post(self.url, json=body, headers=headers)
        except (TimeoutError, httpx2.TimeoutException):
            raise _TryAgain(f"no answer within {self.config.timeout:g} s.") from None
        except httpx2.RequestError as error:
            raise _TryAgain(self._safe(f"{type(error).__name__} ({error}).")) from None
        text = self._safe(response.text)
        if response.status_code == 200:
            reply = _read(text)
            return dataclasses.replace(reply, text=self._safe(reply.text))
        self._refuse(response.status_code, text)
        raise _TryAgain(
            f"status {response.status_code} ({_excerpt(text)}).",
            _requested_wait(response.headers.get("Retry-After")),
        )

    def _refuse(self, status: int, text: str) -> None:
        """Raise if trying again cannot help."""
        # OpenAI's 429 of an account without credit.
        hopeless = status < 500 and (status not in _PASSING or "insufficient_quota" in text)
        if not hopeless:
            return
        name = self.config.key_variable
        advice = "check `judge.url`, `judge.model` and `judge.request`"
        if status in (401, 403):
            advice = f"check the key in {name}" if self.key else f"no key was sent: {name} is unset"
            if name is None:
                advice = "no key was sent; name its variable by `judge.key_variable`"
        raise ConfigError(
            f"{self.url} refuses the request with status {status} ({_excerpt(text)}); {advice}.",
            where="judge",
        )

    def _safe(self, text: str) -> str:
        if self.key is None or len(self.key) < _SHORTEST_SECRET:
            return text
        quoted = json.dumps(self.key)[1:-1]
        for form in (self.key, quoted, quoted.replace("/", r"\/")):
            text = text.replace(form, "[key]")
        return text


def completions_url(config: JudgeConfig) -> str:
    """Return the address that requests go to."""
    return f"{(config.url or '').rstrip('/')}/chat/completions"


def request_body(config: JudgeConfig, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return the request that asks for a reply to ``messages``; null fields are left out."""
    fields: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    fields |= config.request
    kept = {name: value for name, value in fields.items() if value is not None}
    return {"model": config.model, "messages": messages, **kept}


def _read(text: str) -> Reply:
    try:
        value = json.loads(text)
        choice = value["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _TryAgain(f"an answer that is no chat completion ({_excerpt(text)}).") from None
    if not isinstance(content, (str, type(None))):
        raise _TryAgain(f"an answer whose content is no text ({_excerpt(text)}).")
    said = content or (refusal if isinstance(refusal, str) else "")
    usage = value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        # A reply that was cut may end in half of a surrogate pair, which no file can hold.
        text=said.encode("utf-8", "replace").decode(),
        finish="refusal" if refusal else str(choice.get("finish_reason") or ""),
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]}..."


def _requested_wait(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date (RFC 9110)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if seconds == seconds else None  # noqa: PLR0124 - not a number
