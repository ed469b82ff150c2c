"""Exchange values between the trusted examiner and the untrusted candidate.

Sends lines of JSON over a socket. Plain values (numbers, strings, lists, tuples, sets, dicts,
ranges, fractions, decimals) arrive as copies of exact built-in types, so the program's ``__eq__``
never compares on the other side. Everything else stays in place behind a `Stub` on the other side,
which forwards calls, attributes, items and iteration, but not comparison.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import socket
import sys
from collections.abc import Callable, KeysView
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

_MUTABLE = (list, dict, set, bytearray)


class Ended(BaseException):
    """The other side is gone; not an Exception, which a test might catch."""


class Raised(Exception):
    """The other side raised an exception that has no counterpart here."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Peer:
    """One end of the connection.

    Args:
        connection: a connected socket.
        trusting: whether the other side may use attributes of sent objects, or only call them.
    """

    def __init__(self, connection: socket.socket, trusting: bool) -> None:
        self._reader = connection.makefile("r", encoding="ascii", newline="\n")
        self._writer = connection.makefile("w", encoding="ascii", newline="\n")
        self._trusting = trusting
        self._sent: list[Any] = []
        self._numbers: dict[int, int] = {}

    def request(self, verb: str, *arguments: Any, **named: Any) -> Any:
        """Ask the other side to perform ``verb``, serving its requests meanwhile.

        Changes to mutable arguments are copied back.

        Raises:
            Ended: the connection ended.
            Exception: the other side's exception, as the built-in one of the same name, else
                `Raised`.
        """
        packed = [self.pack(arguments), self.pack(named)]
        self._send(["do", verb, *packed])
        while True:
            kind, *rest = self._receive()
            if kind == "do":
                self._serve(*rest)
                continue
            if kind == "error":
                raise _exception(*map(str, rest))
            result, changed = rest
            for place, contents in changed:
                _replace(arguments[place], self.unpack(contents))
            return self.unpack(result)

    def serve(self) -> None:
        """Serve the other side until it is gone."""
        while True:
            try:
                kind, *rest = self._receive()
            except Ended:
                return
            if kind == "do":
                self._serve(*rest)

    def _serve(self, verb: str, packed: Any, named: Any) -> None:
        try:
            arguments = list(self.unpack(packed))
            before = {i: self.pack(a) for i, a in enumerate(arguments) if type(a) in _MUTABLE}
            result = self._do(verb, arguments, self.unpack(named))
            after = {i: self.pack(arguments[i]) for i in before}
            changed = [[i, now] for i, now in after.items() if now != before[i]]
            reply = ["result", self.pack(result), changed]
        except BaseException as error:
            reply = ["error", type(error).__name__, str(error)[:2000]]
        self._send(reply)

    def _do(self, verb: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        target = self._sent[arguments[0]]
        rest = arguments[1:]
        if verb == "call":
            return target(*rest, **named)
        if not self._trusting:
            raise PermissionError(verb)
        return _VERBS[verb](target, *rest)

    def _send(self, message: Any) -> None:
        try:
            self._writer.write(json.dumps(message) + "\n")
            self._writer.flush()
        except OSError:
            raise Ended from None

    def _receive(self) -> list[Any]:
        try:
            line = self._reader.readline()
            message = json.loads(line) if line else None
        except (OSError, ValueError):
            message = None
        if not isinstance(message, list) or not message:
            raise Ended
        return message

    def pack(self, value: Any) -> Any:
        """Encode ``value`` for JSON."""
        if value is None or isinstance(value, (int, float, str)):
            return _scalar(value)
        for name, kinds in _COLLECTIONS.items():
            if isinstance(value, kinds):
                return [name, [self.pack(item) for item in _items(value)]]
        if isinstance(value, dict):
            pairs = dict.items(value)
            return ["dict", [[self.pack(key), self.pack(item)] for key, item in pairs]]
        for name, (exact, pack, _) in _ATOMS.items():
            if type(value) is exact:
                return [name, pack(value)]
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item())
        return self._pack_reference(value)

    def _pack_reference(self, value: Any) -> Any:
        name = getattr(value, "__name__", "") if isinstance(value, type) else ""
        if name and getattr(builtins, name, None) is value:
            return ["class", name]
        if isinstance(value, Stub):
            return ["own", object.__getattribute__(value, "_number")]
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._sent)
            self._sent.append(value)
        return ["stub", self._numbers[id(value)]]

    def unpack(self, packed: Any) -> Any:
        """Return the value, or a `Stub` for it."""
        if not isinstance(packed, list):
            return packed
        name, contents = packed
        if name in _COLLECTIONS:
            return _COLLECTIONS[name][0](self.unpack(item) for item in contents)
        if name == "dict":
            return {self.unpack(key): self.unpack(item) for key, item in contents}
        if name in _ATOMS:
            return _ATOMS[name][2](contents)
        return self._sent[contents] if name == "own" else Stub(self, int(contents))


class Stub:
    """Proxy for an object on the other side."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set attribute", name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "set item", key, value)

    def __len__(self) -> int:
        return _ask(self, "length")

    def __bool__(self) -> bool:
        return bool(_ask(self, "truth"))

    def __iter__(self) -> Any:
        return _ask(self, "iterate")

    def __next__(self) -> Any:
        return _ask(self, "next")

    def __str__(self) -> str:
        return str(_ask(self, "text"))

    def __eq__(self, other: object) -> bool:
        """Whether both refer to the same object, without asking its own ``__eq__``."""
        mine = object.__getattribute__(self, "_number")
        return isinstance(other, Stub) and object.__getattribute__(other, "_number") == mine

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))


def _ask(stub: Stub, verb: str, *arguments: Any, **named: Any) -> Any:
    peer: Peer = object.__getattribute__(stub, "_peer")
    return peer.request(verb, object.__getattribute__(stub, "_number"), *arguments, **named)


def _scalar(value: Any) -> Any:
    """Return an exact built-in scalar without calling a subclass; long integers as hex."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    number = int.__pos__(value)
    return number if number.bit_length() < 1000 else ["int", hex(number)]


def _items(value: Any) -> Any:
    """Iterate like the built-in class, ignoring overrides of a subclass."""
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    kind = next((kind for kind in kinds if isinstance(value, kind)), None)
    return kind.__iter__(value) if kind else iter(value)


def _replace(old: Any, new: Any) -> None:
    """Update a container with the contents of its copy on the other side."""
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)


def _exception(kind: str, message: str) -> BaseException:
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        with contextlib.suppress(TypeError):  # some require other arguments
            return known(message)
    return Raised(kind, message)


def _class(name: str) -> type:
    """Return a built-in class, but no function, which the other side could run here."""
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise TypeError(name)
    return found


def _module(name: str) -> ModuleType | None:
    """Import a module by name if it is in the standard library."""
    if name.partition(".")[0] not in sys.stdlib_module_names:
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_VERBS: dict[str, Callable[..., Any]] = {
    "attribute": getattr,
    "set attribute": setattr,
    "item": lambda target, key: target[key],
    "set item": lambda target, key, value: target.__setitem__(key, value),
    "length": len,
    "truth": bool,
    "iterate": iter,
    "next": next,
    "text": str,
}
_COLLECTIONS: dict[str, tuple[type, ...]] = {
    "list": (list,),
    "tuple": (tuple,),
    "set": (set, KeysView),
    "frozenset": (frozenset,),
}
_ATOMS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "int": (int, hex, lambda digits: int(digits, 16)),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda parts: range(*parts)),
    "fraction": (Fraction, str, Fraction),
    "decimal": (Decimal, str, Decimal),
    "class": (type(None), str, _class),
    "module": (ModuleType, lambda module: module.__name__, _module),
}
