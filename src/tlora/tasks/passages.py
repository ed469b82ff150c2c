"""Long passages that stand somewhere inside other texts, word for word.

A passage stands in a text if its words and symbols (`tlora.tasks.wording`) are a contiguous run of
the text's. Thousands of passages are looked for at once: of each, one window of 24 letters and
digits is kept, the one that the fewest passages share, so that a beginning which all have in common
tells nothing. A text's letters are hashed at every place (Rabin and Karp 1987), and only where a
kept window has the same hash are words and symbols compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tlora.tasks.wording import TOKEN, folded, letters

WORDS = 8
"""Passages of fewer words are not looked for: shorter ones stand in texts by chance."""
SURE_WORDS = 16
"""Passages of fewer words count only where no word follows on the line: that would be another
question, more closely put."""
_WINDOW = 24
_FACTORS = [np.uint32(pow(0x9E3779B1, power, 1 << 32)) for power in (1, 2, 4, 8)]
_TABLE_BITS = 20
_GOES_ON = re.compile(r"[.,:/^]\d")
_WORD_AFTER = re.compile(r"[^\S\n]+\w")
_NUMBER_BEFORE = re.compile(r"\d[.,:/^]$")


class Texts:
    """Texts to be looked through, any number of times.

    Args:
        texts: as they are written; a megabyte or so at a time is fastest.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.folded = [folded(text) for text in texts]
        self.letters = [letters(text) for text in self.folded]

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the letters of each text begin among those of all, int64."""
        sizes = [0, *(len(text) + 1 for text in self.letters[:-1])]
        return np.cumsum(sizes)

    @cached_property
    def hashes(self) -> np.ndarray:
        """The hash of the window at each place of the letters of all, uint32."""
        return _hashes(b"\0".join(self.letters))


class _Passage(NamedTuple):
    letters: bytes
    window: int
    """Where among its letters the kept window begins."""
    tokens: list[str]
    before: int
    """How many symbols come before its first word."""
    short: bool
    """Whether it has fewer than `SURE_WORDS`."""

    def stands_in(self, text: str, its_letters: bytes, start: int) -> bool:
        """Whether it is a run of a folded text's words and symbols, from a place of its letters."""
        if start < 0 or its_letters[start : start + len(self.letters)] != self.letters:
            return False
        found = list(TOKEN.finditer(text))
        number, passed = 0, 0
        while passed < start or not _is_word(found[number].group()):
            word = found[number].group()
            passed += len(word.encode("utf-8", "surrogatepass")) if _is_word(word) else 0
            number += 1
        first = number - self.before
        run = found[max(first, 0) : first + len(self.tokens)]
        if passed != start or [match.group() for match in run] != self.tokens:
            return False
        begin, end = run[0].start(), run[-1].end()
        goes_on = self.short and _WORD_AFTER.match(text, end)
        return not goes_on and not _cuts_a_number(text, begin, end)


class Passages:
    """Passages to be looked for; those that are too short to be told apart are left out.

    Args:
        texts: as they are written.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        passages: dict[tuple[str, ...], bytes] = {}
        for text in map(folded, texts):
            tokens = tuple(TOKEN.findall(text))
            known = letters(text)
            if sum(map(_is_word, tokens)) >= WORDS and len(known) >= _WINDOW:
                passages[tokens] = known
        self._known: dict[int, list[_Passage]] = {}
        joined = b"\0".join(passages.values())
        hashes = _hashes(joined)
        shared = np.bincount(hashes >> (32 - _TABLE_BITS), minlength=1 << _TABLE_BITS)
        start = 0
        for tokens, known in passages.items():
            own = hashes[start : start + len(known) - _WINDOW + 1]
            window = int(shared[own >> (32 - _TABLE_BITS)].argmin())
            before = next(number for number, token in enumerate(tokens) if _is_word(token))
            short = sum(map(_is_word, tokens)) < SURE_WORDS
            passage = _Passage(known, window, list(tokens), before, short)
            self._known.setdefault(int(own[window]), []).append(passage)
            start += len(known) + 1
        self._windows = np.array(sorted(self._known), np.uint32)
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[self._windows >> (32 - _TABLE_BITS)] = True

    def places(self, texts: Texts) -> list[int]:
        """Return the places, from 0, of the texts that one of the passages stands in."""
        if not self._known or not texts.letters:
            return []
        return sorted(set(self._found(texts)))

    def _found(self, texts: Texts) -> Iterator[int]:
        hashes = texts.hashes
        near = np.flatnonzero(self._table[hashes >> (32 - _TABLE_BITS)])
        near = near[np.isin(hashes[near], self._windows)]
        numbers = np.searchsorted(texts.starts, near, side="right") - 1
        offsets = near - texts.starts[numbers]
        hits = (numbers.tolist(), offsets.tolist(), hashes[near].tolist())
        for number, offset, value in zip(*hits, strict=True):
            text, its_letters = texts.folded[number], texts.letters[number]
            for passage in self._known[value]:
                if passage.stands_in(text, its_letters, offset - passage.window):
                    yield number
                    break


def _hashes(text: bytes) -> np.ndarray:
    """Return sum_j text[i + j] f^(23 - j) mod 2^32 for every window's beginning i, by doubling."""
    if len(text) < _WINDOW:
        return np.zeros(0, np.uint32)
    one = np.frombuffer(text, np.uint8).astype(np.uint32)
    two = one[:-1] * _FACTORS[0] + one[1:]
    four = two[:-2] * _FACTORS[1] + two[2:]
    eight = four[:-4] * _FACTORS[2] + four[4:]
    sixteen = eight[:-8] * _FACTORS[3] + eight[8:]
    return sixteen[:-8] * _FACTORS[3] + eight[16:]


def _is_word(token: str) -> bool:
    return token[0].isalnum()


def _cuts_a_number(text: str, start: int, end: int) -> bool:
    """Whether a run's first or last number goes on outside of it, as the 3 of 3.5 does."""
    after = text[end - 1].isdigit() and _GOES_ON.match(text, end)
    before = text[start].isdigit() and _NUMBER_BEFORE.search(text[max(0, start - 2) : start])
    return bool(after or before)
