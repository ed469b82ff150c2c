"""Judgements on disk, one JSON file each, so that none is paid for twice.

The name of a file is a digest of all that defines the request: address, model, messages,
temperature, limits and whatever else is sent. The key is no part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError
from tlora.evaluation.mtbench.endpoint import Reply
from tlora.files import read_json, write_json


class JudgementCache:
    """A folder of replies; making this object touches nothing. Processes may share it."""

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
