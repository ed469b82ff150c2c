"""The normal form in which prompts are compared: words and symbols, without what does not count.

Texts are taken after Unicode's compatibility form (NFKC) and casefolding. White space, the marks
``. , ; : ! ? _``, quotes and apostrophes, ellipses, dashes (also written --), and a hyphen between
two letters do not count. Every other symbol does: x - 5 and x + 5 differ.
"""

from __future__ import annotations

import re
import unicodedata

_LETTER = r"[^\W\d_]"
_MINUS = rf"(?<!-)(?<!{_LETTER})-(?!-)|(?<!-)-(?!-)(?!{_LETTER})"
_TOKEN = re.compile(rf"[^\W_]+|[^\w\s.,;:!?'\"`´‘’‚‛“”„«»…–—-]|{_MINUS}")  # noqa: RUF001


def normalize(text: str) -> list[str]:
    """Return the words and symbols of ``text`` that count; of a text of mere marks, the marks."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return _TOKEN.findall(folded) or [folded.strip()]
