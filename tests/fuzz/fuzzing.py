"""How cases are counted and guarded, and how a file or a value is damaged.

A case damages one thing that the product reads and calls the function that reads it. The function
may accept what it finds, or refuse it with an error of `tlora.errors`. Anything else fails: another
exception, more than `MEMORY` bytes beyond those that were in use, more than `SECONDS` of computing.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tlora.errors import TLoraError, system_fault

IN_CI = 2000
CASES = int(os.environ.get("TLORA_FUZZ_CASES", f"{IN_CI}"))
"""Cases of all tests of this folder together."""
MEMORY = 4 * 2**30
SECONDS = 60
"""Of the processor, so that a busy machine fails no case."""

Read = TypeVar("Read")


def fuzz(count: int, **drawn: Any) -> Callable[[Any], Any]:
    """Run a test on ``count`` of the `IN_CI` cases, more or fewer as `CASES` says.

    In CI the cases are the same every time; with more than that, they are new ones.
    """

    def decorate(test: Any) -> Any:
        return settings(
            max_examples=max(1, count * CASES // IN_CI),
            derandomize=CASES <= IN_CI,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )(given(**drawn)(test))

    return decorate


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound what the body may take of memory and of the processor."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"it computed for {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def accepted(read: Callable[[], Read]) -> Read | None:
    """Return what ``read`` returns; None where it refuses with an error of the tree."""
    with bounded():
        try:
            return read()
        except Exception as error:
            fault = error if isinstance(error, TLoraError) else system_fault(error)
            if fault is None:
                raise
            assert str(fault).strip()
            return None


_NUMBERS = [0, 1, 2, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**64 - 1]
_TOKENS = [
    *(b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"9" * 5000, b"true", b'""'),
    *(b"[]", b"{}", b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"\xff\xfe", b"\xc3", b"\x00"),
    *(b"\r", b"\n", b'"', b",", b"}", b": ", b"- ", b"&a [*a]", b"!!int x", b"#", b"\t", b"../"),
]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a file's content with one to three changes of its bytes."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("flip", "byte", "number", "token", "cut", "end", "copy")))
        place = draw(st.integers(0, max(0, len(data) - 1)))
        other = draw(st.integers(0, max(0, len(data) - 1)))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "number":
            width = draw(st.sampled_from((2, 4, 8)))
            number = draw(st.sampled_from(_NUMBERS)) % 256**width
            start = draw(st.sampled_from((place, place - place % width, 0)))
            data[start : start + width] = number.to_bytes(width, "little")
        elif kind == "token":
            data[place : place + draw(st.integers(0, 8))] = draw(st.sampled_from(_TOKENS))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 16))]
        elif kind == "end":
            del data[place:]
        elif kind == "copy":
            data[place:place] = data[other : other + draw(st.integers(1, 64))]
    return bytes(data)


_TEXTS = ["", "x", "0", "a" * 3000, "\0", "\ud800", "../x", "(", "*", "[", "{x}", "-1", "nan", "é"]
_TEXTS += ["2GiB", "all-linear", "1e999", "\u2028", "/", "a.b", "C:\\x", "%s", "null", "~", "a,b"]
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.sampled_from([None, True, False, 10**30, 10**400, -(10**400), 1e308, 5e-324, -0.0]),
        st.sampled_from([float("nan"), float("inf"), -float("inf"), *_NUMBERS, -1]),
        st.sampled_from(_TEXTS),
        st.integers(-3, 40),
        st.floats(-10, 10),
        st.text(max_size=6),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_TEXTS), inner, max_size=3)
    ),
    max_leaves=4,
)
"""Values that a file may hold in place of the right ones."""
DEEP = "[" * 100 + "]" * 100


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value within a value of JSON."""
    named = dict(enumerate(value)) if isinstance(value, list) else value
    for key, inner in named.items() if isinstance(named, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """Return a value of JSON in which one or two of the values are others, are gone or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        paths = list(places(value))
        if not paths:
            return value
        *path, last = draw(st.sampled_from(paths))
        inner = value
        for key in path:
            inner = inner[key]
        kind = draw(st.sampled_from(("junk", "junk", "junk", "near", "gone", "renamed", "deep")))
        if kind == "gone":
            del inner[last]
        elif kind == "renamed" and isinstance(inner, dict):
            inner[draw(st.sampled_from(_TEXTS))] = inner.pop(last)
        elif kind == "near" and type(inner[last]) in (int, float):
            inner[last] = inner[last] * draw(st.sampled_from((-1, 0, 2, 10**6, 10**18, 0.5)))
        elif kind == "near":
            *_, other = [value, *(at(value, each) for each in paths[: draw(st.integers(0, 30))])]
            inner[last] = copy.deepcopy(other)
        else:
            inner[last] = json.loads(DEEP) if kind == "deep" else draw(JUNK)
    return value


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path."""
    for key in path:
        value = value[key]
    return value


def as_json(value: Any) -> bytes:
    """Return a value as JSON, with NaN and infinities as Python writes them."""
    return json.dumps(value).encode()


def json_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Return the strategy of a damaged JSON file: its bytes, or the values in it."""
    return damaged(content) | edited(json.loads(content)).map(as_json)


def tensor_file(content: bytes, *, with_header: bool = True) -> st.SearchStrategy[bytes]:
    """Return the strategy of a damaged safetensors file: its bytes, or what its header says."""
    end = 8 + int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:end]), content[end:]

    def joined(value: Any) -> bytes:
        text = as_json(value)
        return len(text).to_bytes(8, "little") + text + body

    start = damaged(content[: end + 16]).map(lambda first: first + content[end + 16 :])
    return st.one_of(damaged(content), start, *[edited(header).map(joined)] * with_header)
