"""Detects credentials by field name and by form, so that none is saved or shown.

A configuration with a credential is refused (`faults`), so that none reaches a file; shown and
logged text has them replaced (`redacted`), as other libraries' messages may quote one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

_NAME = (
    r"(?:[\w.-]*[_.-])?(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!image_)"
    r"(?:token|secret|password|passwd|passphrase|credentials?|authorization|api[_-]?key"
    r"|(?:access|secret|private|account|signing|ssh|encryption)[_-]key(?:[_-]id)?)"
)
_NAMED = re.compile(_NAME, re.IGNORECASE)
_FORM = re.compile(
    r"\b(?:hf_(?:oauth_|jwt_)?(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{16,}"  # Hugging Face
    # OpenAI, Anthropic and others; `opus-mt-sk-en-finetuned-v2` is a name.
    r"|sk-(?:(?:proj|ant|svcacct|admin|None|or|lf)-[\w-]{16,}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{16,})"
    r"|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}"  # AWS, Google, Slack
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_QUERY = re.compile(
    rf"(?<=[?&])(?P<name>{_NAME}|sig|signature|X-Amz-\w+|key)=[^&#\s'\"]+", re.IGNORECASE
)
_GIVEN = re.compile(
    rf"\b(?P<head>{_NAME}[`'\"]?\s*(?:[:=]\s*['\"]?(?:Bearer\s+|Basic\s+)?|is\s+['\"]))"
    r"(?!Bearer\s|Basic\s)[^\s'\",;(){}\[\]]{6,}",
    re.IGNORECASE,
)
_SHORTEST = 12
"""Minimum length of an environment value to search for; a shorter one may be a word."""
HIDDEN = "[hidden]"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_secret_name(name: str) -> bool:
    """Return whether a field or variable of this name holds a credential, such as `hub_token`.

    `pad_token` and the like, and token counts, do not.
    """
    return _NAMED.fullmatch(name) is not None


def holds(text: str) -> bool:
    """Return whether a text contains the form of a credential, or one from the environment."""
    if any(pattern.search(text) for pattern in (_FORM, _USER_INFO, _QUERY)):
        return True
    return any(value in text for value in _environment_credentials())


def faults(name: str, value: Any, within: tuple[int, ...] = ()) -> Iterator[str]:
    """Yield a sentence for each credential in the field ``name``, never with the value.

    Args:
        name: the field's dotted name in sentences.
        value: its value; lists and mappings are searched.
        within: enclosing values, by `id`: YAML's aliases may be circular.
    """
    if id(value) in within:
        return
    within = (*within, id(value))
    named = is_secret_name(name) and value and not isinstance(value, bool)
    # Templates and messages may contain `token: ...`; text fields of the trainer do not.
    told = name.startswith("trainer") and isinstance(value, str) and _GIVEN.search(value)
    if named or told or (isinstance(value, str) and holds(value)):
        yield (
            f"`{redacted(name)}` holds a credential (not shown here), and a "
            f"configuration is written to disk; remove it, and {_advice(name)}."
        )
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from faults(f"{name}.{key}", inner, within)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from faults(name, inner, within)


def redacted(text: str) -> str:
    """Return a text with every credential replaced that its form, name or place reveals."""
    for value in _environment_credentials():
        text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(HIDDEN, _FORM.sub(HIDDEN, text))
    text = _QUERY.sub(rf"\g<name>={HIDDEN}", text)
    return _GIVEN.sub(rf"\g<head>{HIDDEN}", text)


def printable(text: str) -> str:
    """Return a text without sequences that move a terminal's cursor, color it or set its title."""
    return _CONTROL.sub("", text)


class RedactingFormatter(logging.Formatter):
    """Formats log lines without credentials and as plain text, whichever library logs them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(redacted(super().format(record)))


def _advice(name: str) -> str:
    if name.startswith("judge."):
        return "set the environment variable that `judge.key_variable` names"
    return "set HF_TOKEN or run `hf auth login`"


def _environment_credentials() -> list[str]:
    """Return the credentials in the environment, longest first."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value.strip()) >= _SHORTEST
    }
    return sorted(found, key=len, reverse=True)
