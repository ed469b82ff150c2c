"""HumanEval+ and MBPP+: a program has to answer as the reference solution does, input by input.

The files are EvalPlus's (Liu et al., arXiv 2305.01210): a row has task_id, prompt, entry_point,
canonical_solution, base_input and plus_input (lists of argument lists) and atol. Departures from
its own engine: all inputs of a program share one time limit; tuples and sets among the inputs are
lists, as JSON has them, and inputs that the reference itself refuses in that form are left out;
its special oracles of single problems (the root of a polynomial, answers in any order) are not
known here.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tlora.errors import DataError
from tlora.evaluation.code import Check

Part = Literal["base_input", "plus_input"]


def alike(value: Any, expected: Any, tolerance: float) -> bool:
    """Whether a program's value is the reference's: equal, or for floats close enough.

    ``|value - expected| <= tolerance + 1e-7 |expected|``, in lists and tuples for each element;
    a tolerance of 0 is 1e-6 where a float is expected.
    """
    if value == expected:
        return True
    numbers = (int, float)
    if isinstance(expected, numbers) and isinstance(value, numbers):
        allowed = tolerance or (1e-6 if isinstance(expected, float) else 0.0)
        return bool(allowed) and abs(value - expected) <= allowed + 1e-7 * abs(expected)
    if isinstance(expected, (list, tuple)) and type(value) is type(expected):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(alike(*pair, tolerance) for pair in pairs)
    return False


def agree(program: Callable, reference: Callable, inputs: list[list], tolerance: float) -> None:
    """Raise unless ``program`` answers every input as ``reference`` does.

    Runs beside the program's process and has only what Python itself has.
    """
    import copy

    compared = 0
    for arguments in inputs:
        try:
            expected = reference(*copy.deepcopy(arguments))
        except Exception:
            continue
        compared += 1
        value = program(*copy.deepcopy(arguments))
        assert alike(value, expected, tolerance), f"{arguments!r} gives {value!r}"[:300]
    assert compared or not inputs, "the reference solution refuses every input"


def inputs_check(row: Mapping[str, Any], program: str, part: Part) -> Check:
    """Return the check of ``program`` on one of the two sets of inputs of an EvalPlus row.

    Raises:
        DataError: the row lacks a column, or a column is not what it should be.
    """
    columns = ("prompt", "entry_point", "canonical_solution", part)
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(f"row {row.get('task_id')}: it has no column {missing[0]!r}.")
    inputs, name = row[part], row["entry_point"]
    if not isinstance(inputs, list) or not all(isinstance(each, list) for each in inputs):
        raise DataError(f"row {row.get('task_id')}: column {part!r} is no list of argument lists.")
    reference = row["prompt"] + row["canonical_solution"]
    tests = (
        "from __future__ import annotations",
        "import json",
        "from collections.abc import Callable",
        "from typing import Any",
        inspect.getsource(alike),
        inspect.getsource(agree),
        "solution = {'__name__': 'reference'}",
        f"exec({reference!r}, solution)",
        f"inputs = json.loads({json.dumps(inputs)!r})",
        f"agree({name}, solution[{name!r}], inputs, {float(row.get('atol') or 0.0)!r})",
    )
    return Check(program, "\n".join(tests), (name,))
