"""Send requests to an OpenAI-compatible chat completions endpoint with the `openai` client.

The client retries temporary failures (429, 5xx, timeouts, lost connections) with exponential
backoff or after the endpoint's Retry-After. Permanent failures (a wrong key, an unknown model) are
errors at once.

The key is read from the environment, sent in a header, and removed from the endpoint's messages
before they are shown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, JudgeError
from tlora.scoring.mtbench.judgeconfig import JudgeConfig, is_local
from tlora.scoring.mtbench.prompts import rating

if TYPE_CHECKING:
    import openai

_EXCERPT = 300
_SHORTEST_SECRET = 8
"""Shorter keys are placeholders ("EMPTY", "none") for servers that check none."""
_PASSING = (408, 409, 429)
"""Statuses that the client retries, besides 5xx."""


@dataclass(frozen=True)
class Reply:
    """Response to a request."""

    text: str
    """The judge's text; may be empty."""
    finish: str
    """Reason why it stopped: "stop", "length", "content_filter", or "refusal" if the endpoint
    reports that the judge declined."""
    tokens_in: int
    """Prompt tokens counted by the endpoint; 0 if missing."""
    tokens_out: int
    """Answer tokens counted by the endpoint; 0 if missing."""

    @property
    def status(self) -> str:
        """ "rated", or the reason for a missing grade.

        "declined" (reported by the endpoint), "no rating" (no number in brackets, as in "I cannot
        judge this"), "cut off" (none before `judge.max_tokens`), or "out of range".
        """
        found = rating(self.text)
        if self.finish in ("refusal", "content_filter"):
            return "declined"
        if found is None:
            return "cut off" if self.finish == "length" else "no rating"
        return "rated" if 1 <= found <= 10 else "out of range"

    @property
    def score(self) -> float | None:
        """The grade, 1 to 10; None if unreadable, which excludes the answer from means."""
        return rating(self.text) if self.status == "rated" else None


def read_key(config: JudgeConfig) -> str | None:
    """Return the key from the environment, or None without one.

    Raises:
        ConfigError: it is invalid in a header, or would be sent unencrypted to another machine.
    """
    name = config.key_variable
    key = os.environ.get(name, "").strip() if name else ""
    if not key:
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"the key in {name} has characters that are invalid in a header; set it again.", "judge"
        )
    url = config.url or ""
    if url.startswith("http:") and not is_local(url):
        raise ConfigError(
            f"the key in {name} would be sent unencrypted to {url}; use an https address, or send"
            " no key with `judge.key_variable: null`.",
            where="judge",
        )
    return key


@contextmanager
def connected(config: JudgeConfig) -> Iterator[Endpoint]:
    """Yield the judge's endpoint; threads may share it.

    Raises:
        ConfigError: the key is invalid or would be sent unencrypted.
    """
    key = read_key(config)
    import openai

    # Use no proxy for requests to this machine itself.
    transport = openai.DefaultHttpxClient(
        timeout=config.timeout, trust_env=not is_local(config.url or ""), follow_redirects=False
    )
    with openai.OpenAI(
        base_url=config.url,
        api_key=key or "",
        max_retries=config.retries,
        timeout=config.timeout,
        http_client=transport,
    ) as client:
        yield Endpoint(config, client, key)


@dataclass
class Endpoint:
    """A judge's address."""

    config: JudgeConfig
    client: openai.OpenAI = field(repr=False)
    key: str | None = field(repr=False)

    def request(self, body: dict[str, Any]) -> Reply:
        """Send one request, with retries by the client.

        Raises:
            ConfigError: the endpoint rejects the key, the model or the request.
            JudgeError: every try failed, or the answer is not a chat completion.
        """
        import httpx2
        import openai

        # Set explicitly, or the client would send a key that it finds itself (OPENAI_ADMIN_KEY).
        headers = {"Authorization": f"Bearer {self.key}" if self.key else openai.omit}
        url = completions_url(self.config)
        try:
            response = self.client.post(
                "/chat/completions",
                cast_to=httpx2.Response,
                body=body,
                options={"headers": headers},
            )
            return self._read(response.text)
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, self._safe(error.response.text)) from None
        except openai.APIConnectionError as error:  # timeouts too
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {self._safe(str(cause))}"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            reason = f"not a chat completion: {self._safe(response.text)}"
        raise JudgeError(f"{url} gave no judgment ({_excerpt(reason)}).")

    def _refusal(self, status: int, text: str) -> ConfigError | JudgeError:
        """Return the error for a status: temporary, or one that the user has to fix."""
        url = completions_url(self.config)
        if status >= 500 or status in _PASSING:
            return JudgeError(f"{url} gave no judgment (status {status}: {_excerpt(text)}).")
        advice = "check `judge.url`, `judge.model` and `judge.request`"
        if status in (401, 403):
            name = self.config.key_variable
            advice = f"check the key in {name}" if self.key else f"no key was sent: {name} is unset"
        return ConfigError(
            f"{url} rejects the request with status {status} ({_excerpt(text)}); {advice}.",
            where="judge",
        )

    def _read(self, text: str) -> Reply:
        value = json.loads(self._safe(text))
        choice = value["choices"][0]
        refusal, usage = choice["message"].get("refusal"), value.get("usage") or {}
        said = self._safe(choice["message"].get("content") or refusal or "")
        return Reply(
            # A truncated reply may end in half a surrogate pair, which cannot be written to a file.
            text=said.encode("utf-8", "replace").decode(),
            finish="refusal" if refusal else str(choice.get("finish_reason")),
            tokens_in=int(usage.get("prompt_tokens") or 0),
            tokens_out=int(usage.get("completion_tokens") or 0),
        )

    def _safe(self, text: str) -> str:
        if self.key is None or len(self.key) < _SHORTEST_SECRET:
            return text
        quoted = json.dumps(self.key)[1:-1]
        for form in (self.key, quoted, quoted.replace("/", r"\/")):
            text = text.replace(form, "[key]")
        return text


def completions_url(config: JudgeConfig) -> str:
    """Return the URL for requests."""
    return f"{(config.url or '').rstrip('/')}/chat/completions"


def request_body(config: JudgeConfig, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return the request body for ``messages``, without null fields."""
    fields: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    fields |= config.request
    kept = {name: value for name, value in fields.items() if value is not None}
    return {"model": config.model, "messages": messages, **kept}


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]}..."
