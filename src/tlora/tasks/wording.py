"""Which texts have the same wording: their words and symbols, without what does not count.

The words and symbols of a text are taken after Unicode's compatibility form (NFKC) and casefolding.
What does not count: white space, the marks ``. , ; : ! ? _``, quotes and apostrophes, ellipses,
dashes (also written --), and a hyphen between two letters. Every other symbol counts: x - 5 and
x + 5 are two wordings.
"""

from __future__ import annotations

import re
import unicodedata

_LETTER = r"[^\W\d_]"
_MINUS = rf"(?<!-)(?<!{_LETTER})-(?!-)|(?<!-)-(?!-)(?!{_LETTER})"
TOKEN = re.compile(rf"[^\W_]+|[^\w\s.,;:!?'\"`´‘’‚‛“”„«»…–—-]|{_MINUS}")  # noqa: RUF001
"""A word or a symbol of a folded text."""
_WORD = re.compile(r"[^\W_]+")
_MARKS = bytes(byte for byte in range(128) if not chr(byte).isalnum())


def folded(text: str) -> str:
    """Return the form in which letters are compared."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def letters(text: str) -> bytes:
    """Return the letters and digits alone of a folded text: the same for the same wording.

    Of plain ASCII they cost a twentieth of what the words and symbols do.
    """
    if text.isascii():
        return text.encode().translate(None, _MARKS)
    return "".join(_WORD.findall(text)).encode("utf-8", "surrogatepass")
