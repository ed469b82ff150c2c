"""HumanEval and MBPP: the check to run for a completion, and pass@k of the results.

Sources: HumanEval and pass@k, Chen et al., arXiv 2107.03374; MBPP, Austin et al., arXiv
2108.07732. Departure from both harnesses: the tests do not share a process with the program (see
`tlora.scoring.sandbox.inside`), and a test sees copies of plain values.
"""

from __future__ import annotations

import ast
import builtins
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from tlora.errors import ConfigError, DataError
from tlora.scoring.sandbox import Result, Sandbox

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""Stop sequences for a HumanEval prompt (Chen et al., section 3), and a fence."""
MBPP_STOPS = ("\nassert", "\nprint", "\nif __name__", "\n```", "[DONE]")
"""Stop sequences for an MBPP program: tests, a demonstration, a fence, the prompt's own mark."""


@dataclass(frozen=True)
class Check:
    """One program and the tests it has to pass."""

    program: str
    """The model's text, after the prompt for HumanEval: untrusted."""
    tests: str
    """The data set's tests: trusted."""
    entry_points: tuple[str, ...]
    """Names that tests take from the program even if they are Python built-ins."""


def truncated(completion: str, stops: Iterable[str]) -> str:
    """Return ``completion`` up to the first of ``stops`` in it."""
    ends = [completion.find(stop) for stop in stops]
    return completion[: min((end for end in ends if end >= 0), default=None)]


def humaneval_check(row: Mapping[str, str], completion: str) -> Check:
    """Return the check of a HumanEval row: prompt and completion, then ``check(entry_point)``.

    Raises:
        DataError: the row lacks a column.
    """
    prompt, test, name = columns(row, "prompt", "test", "entry_point")
    # Some tests call helpers that the prompt defines; use the data set's version, because the
    # program's own could influence its verdict.
    helpers = prompt.partition(f"def {name}(")[0]
    program = prompt + truncated(completion, HUMANEVAL_STOPS)
    return Check(program, f"{helpers}\n{test}\ncheck({name})\n", (name,))


def mbpp_check(row: Mapping[str, object], completion: str) -> Check:
    """Return the check of an MBPP row: the completion, then setup and asserts.

    Raises:
        DataError: the row lacks a column, or its tests are not Python.
    """
    setup, tests = columns(row, "test_setup_code", "test_list")
    source = "\n".join([str(setup), *map(str, tests)])
    try:
        names = _called(source)
    except SyntaxError as error:
        raise DataError(
            f"MBPP row {row.get('task_id')}: its tests are not valid Python: {error}; download the"
            " file again."
        ) from None
    return Check(truncated(completion, MBPP_STOPS), source, names)


def columns(row: Mapping[str, Any], *names: str) -> list[Any]:
    """Return the columns of a row.

    Raises:
        DataError: a column is missing.
    """
    missing = [name for name in names if name not in row]
    if missing:
        raise DataError(
            f"row {row.get('task_id')}: column {missing[0]!r} is missing; download the file again."
        )
    return [row[name] for name in names]


def _called(tests: str) -> tuple[str, ...]:
    """Return the tested names: those that every assert calls.

    For ``assert set(pairs(3)) == set()`` that is pairs: a built-in only counts if the asserts have
    no other name in common, as in ``assert sum(3, 4) == 7``.
    """
    asserts = [node for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Assert)]
    names = [
        {
            call.func.id
            for call in ast.walk(node)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        }
        for node in asserts
    ]
    common = set.intersection(*names) if names else set()
    return tuple(sorted({n for n in common if not hasattr(builtins, n)} or common))


def run_checks(
    sandbox: Sandbox, checks: Sequence[Check], workers: int | None = None
) -> list[Result]:
    """Run all checks, ``workers`` at a time (default: one per CPU); results in order."""
    count = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(count) as pool:
        running = pool.map(lambda c: sandbox.run(c.program, c.tests, c.entry_points), checks)
        return list(tqdm(running, total=len(checks), desc="programs", disable=None))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that k samples drawn without replacement contain a right one.

    With n samples, c of them right: ``1 - C(n - c, k) / C(n, k)``, computed as ``1 - prod_{i =
    n-c+1}^{n} (1 - k / i)``, whose factors lie between 0 and 1: no large number is divided.

    Raises:
        ConfigError: not ``0 <= right <= samples`` and ``1 <= k <= samples``.

    Source: Chen et al. (arXiv 2107.03374), section 2.1: unbiased, unlike ``1 - (1 - c/n)^k``.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ConfigError(
            f"pass@{k} is undefined for {samples} samples with {right} correct; use at least"
            " k samples.",
            where="pass@k",
        )
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))
