"""Normalize prompts for comparison into significant words and symbols.

Applies Unicode NFKC and casefolding. Drops white space, the marks ``. , ; : ! ? _``, quotes and
apostrophes, ellipses, dashes (also written --), and a hyphen between two letters. Keeps every other
symbol: x - 5 and x + 5 differ.
"""

from __future__ import annotations

import re
import unicodedata

_LETTER = r"[^\W\d_]"
_MINUS = rf"(?<!-)(?<!{_LETTER})-(?!-)|(?<!-)-(?!-)(?!{_LETTER})"
_TOKEN = re.compile(rf"[^\W_]+|[^\w\s.,;:!?'\"`´‘’‚‛“”„«»…–—-]|{_MINUS}")  # noqa: RUF001


def normalize(text: str) -> list[str]:
    """Return the significant words and symbols of ``text``; if it has only marks, the marks."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return _TOKEN.findall(folded) or [folded.strip()]
