"""The process in which math-verify runs: a line of JSON in, a line of JSON out.

Run by its path, never imported: `tlora.evaluation.symbolic` starts it, sets the time limits from
outside and ends it. That is why math-verify's own limits, which are signals of the main thread,
are off. Model output can ask for numbers of any size, hence the limit on memory.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from typing import Any, TextIO


def main(memory: int) -> None:
    """Answer until stdin ends; ``memory`` is the most address space in bytes."""
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    replies, sys.stdout = sys.stdout, sys.stderr
    _send(replies, "ready")
    for line in sys.stdin:
        answer, reference = json.loads(line)
        try:
            # The box ends what is read: nothing outside it is taken for the answer.
            given, right = (
                parse(rf"\boxed{{{text}}}", parsing_timeout=None, extraction_mode="first_match")
                for text in (answer, reference)
            )
            equal = verify(right, given, timeout_seconds=None) if given and right else None
            if equal and _tiny_and_different(given[0], right[0]):
                equal = False
        except (MemoryError, RecursionError):
            equal = None
        _send(replies, equal)


def _tiny_and_different(one: Any, other: Any) -> bool:
    """Whether two numbers agree to the six decimals of math-verify only since both are tiny."""
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return False
    first, second = one.evalf(), other.evalf()
    size = max(abs(first), abs(second))
    return bool(0 < size < 1e-3 and abs(first - second) > 1e-6 * size)


def _send(replies: TextIO, reply: object) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
