"""Requests to an endpoint that speaks OpenAI's chat completions, by the `openai` client.

The client retries what passes by itself (429, 5xx, timeouts, lost connections), with waits that
double or that the endpoint asks for by Retry-After. An answer that is no chat completion counts as
a lost connection, so it is retried too. What would fail again (a wrong key, an unknown model) is an
error at once.

The key is read from the environment, sent in a header, and taken out of whatever the endpoint says
before anyone sees it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, JudgeError
from tlora.evaluation.mtbench.config import JudgeConfig, is_local

if TYPE_CHECKING:
    import httpx2
    import openai

_EXCERPT = 300
_SHORTEST_SECRET = 8
"""Shorter keys are fillers ("EMPTY", "none") for servers that check none."""
_TRY = "x-stainless-retry-count"
"""Header in which the client says how often it has sent a request before."""


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


@asynccontextmanager
async def connected(config: JudgeConfig) -> AsyncIterator[Endpoint]:
    """Yield the judge's endpoint, to be used from this event loop.

    Raises:
        ConfigError: the key cannot be sent.
    """
    import openai

    key = read_key(config)
    # No proxy stands between this machine and itself.
    transport = openai.DefaultAsyncHttpxClient(
        timeout=config.timeout,
        trust_env=not is_local(config.url or ""),
        follow_redirects=False,
        event_hooks={"response": [lambda response: _check(response, config.timeout)]},
    )
    async with openai.AsyncOpenAI(
        base_url=config.url,
        api_key=key or "",
        max_retries=config.retries,
        timeout=config.timeout,
        http_client=transport,
    ) as client:
        yield Endpoint(config, client, key)


@dataclass
class Endpoint:
    """A judge's address; `retried` counts the tries that failed and were made again."""

    config: JudgeConfig
    client: openai.AsyncOpenAI = field(repr=False)
    key: str | None = field(repr=False)
    retried: int = 0

    async def request(self, body: dict[str, Any]) -> Reply:
        """Send one request, and again where that may help.

        Raises:
            ConfigError: the endpoint refuses the key, the model or the request.
            JudgeError: it did not answer in any of the tries.
        """
        import httpx2
        import openai

        # Said here, or the client would send a key that it finds itself (OPENAI_ADMIN_KEY).
        headers = {"Authorization": f"Bearer {self.key}" if self.key else openai.omit}
        try:
            response = await self.client.post(
                "/chat/completions",
                cast_to=httpx2.Response,
                body=body,
                options={"headers": headers},
            )
        except openai.APIStatusError as error:
            raise self._refusal(error.response) from None
        except openai.APITimeoutError as error:
            reason = f"no answer within {self.config.timeout:g} s"
            raise self._failure(error.request, reason) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__} ({_excerpt(self._safe(str(cause)))})"
            raise self._failure(error.request, reason) from None
        self.retried += _tries(response.request) - 1
        reply = _read(self._safe(response.text))
        return dataclasses.replace(reply, text=self._safe(reply.text))

    def _refusal(self, response: httpx2.Response) -> ConfigError | JudgeError:
        """Return the error for a status: it may pass later, or the user has to change something."""
        status, text = response.status_code, _excerpt(self._safe(response.text))
        if status >= 500 or (status in (408, 409, 429) and not _without_credit(response)):
            return self._failure(response.request, f"status {status} ({text})")
        name = self.config.key_variable
        advice = "check `judge.url`, `judge.model` and `judge.request`"
        if status in (401, 403):
            advice = f"check the key in {name}" if self.key else f"no key was sent: {name} is unset"
            if name is None:
                advice = "no key was sent; name its variable by `judge.key_variable`"
        return ConfigError(
            f"{completions_url(self.config)} refuses the request with status {status} ({text});"
            f" {advice}.",
            where="judge",
        )

    def _failure(self, request: httpx2.Request, reason: str) -> JudgeError:
        url = completions_url(self.config)
        return JudgeError(f"{url} gave no judgement (tries: {_tries(request)}): {reason}.")

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


async def _check(response: httpx2.Response, seconds: float) -> None:
    """Read a whole response in time, and let the client retry one that is no chat completion."""
    import httpx2

    try:
        # The client's own timeout is one for each read: a slow trickle would never end.
        await asyncio.wait_for(response.aread(), seconds)
        if response.status_code == 200:
            _read(response.text)
    except asyncio.TimeoutError:
        raise httpx2.ReadTimeout("too slow", request=response.request) from None
    except ValueError as error:
        raise httpx2.DecodingError(str(error), request=response.request) from None
    if _without_credit(response):
        response.headers["x-should-retry"] = "false"


def _without_credit(response: httpx2.Response) -> bool:
    """Whether this is OpenAI's 429 of an account without credit, which waiting does not mend."""
    return response.status_code == 429 and "insufficient_quota" in response.text


def _tries(request: httpx2.Request) -> int:
    return int(request.headers[_TRY]) + 1


def _read(text: str) -> Reply:
    """Return what a chat completion says; ValueError where it is none."""
    try:
        value = json.loads(text)
        choice = value["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"not a chat completion: {text}") from None
    if not isinstance(content, (str, type(None))):
        raise ValueError(f"a chat completion without text: {text}")
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
