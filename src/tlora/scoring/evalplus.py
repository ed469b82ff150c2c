"""HumanEval+ and MBPP+: compare a program with the reference solution, input by input.

The files are EvalPlus's (Liu et al., arXiv 2305.01210): a row has task_id, prompt, entry_point,
canonical_solution, base_input and plus_input (lists of argument lists) and atol. Values are
compared by EvalPlus's own rules (`tlora.scoring.evalplus_rules`). The package itself is not
used: it runs program and tests in one process, stores the expected values in a pickle, and depends
on the clients of three model providers. Departures: all inputs of a program share one time limit,
and numpy arrays returned by a program are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tlora.errors import DataError
from tlora.scoring.pass_at_k import Check, columns

Part = Literal["base_input", "plus_input"]
_RULES = Path(__file__).with_name("evalplus_rules.py")


def inputs_check(row: Mapping[str, Any], program: str, part: Part) -> Check:
    """Return the check of ``program`` on one of the two sets of inputs of an EvalPlus row.

    Raises:
        DataError: a column is missing or invalid.
    """
    names = ("task_id", "entry_point", "prompt", "canonical_solution", part)
    task, name, prompt, solution, inputs = columns(row, *names)
    if not isinstance(inputs, list) or not all(isinstance(each, list) for each in inputs):
        raise DataError(
            f"row {task}: column {part!r} is not a list of argument lists; download the file again."
        )
    reference = prompt + solution
    tests = (
        f"evalplus_program = {name}",
        _RULES.read_text(encoding="utf-8"),
        "import json",
        "evalplus_reference = {'__name__': 'reference'}",
        f"exec({reference!r}, evalplus_reference)",
        f"inputs = json.loads({json.dumps(inputs)!r})",
        f"functions = evalplus_program, evalplus_reference[{name!r}]",
        f"tolerance = {float(row.get('atol') or 0.0)!r}",
        f"evalplus_compare({task!r}, {name!r}, functions, inputs, tolerance)",
    )
    return Check(program, "\n".join(tests), (name,))
