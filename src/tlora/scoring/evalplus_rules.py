"""EvalPlus's comparison rules: Python inputs, oracles, float tolerances.

The text of this file precedes the tests of a problem and runs in the sandbox, outside the program's
process. So it only imports the standard library, and numpy only if two values differ and a
tolerance applies.

Source: EvalPlus 0.3.1 (Liu et al., arXiv 2305.01210), evalplus/eval/__init__.py, _special_oracle.py
and data/mbpp.py; the same verdicts, which a test holds against verdicts of that release.
"""

import copy
import math
from typing import Any


def _all_tuples(value: Any) -> Any:
    return tuple(map(_all_tuples, value)) if isinstance(value, list) else value


_TUPLES = (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630)
_LISTS = (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780)
_FORMS: dict[tuple[int, ...], Any] = {
    (*_TUPLES, 726, 740, 744, 809): lambda *a: [tuple(x) for x in a],
    _LISTS: lambda *a: [[tuple(x) for x in each] for each in a],
    (75, 413, 444, 753): lambda a, b: [[tuple(x) for x in a], b],
    (106, 750): lambda a, b: [a, tuple(b)],
    (250, 307, 405, 446, 617, 720, 763, 808): lambda a, *b: [tuple(a), *b],
    (259, 401, 445): lambda *a: [tuple(tuple(x) for x in each) for each in a],
    (580, 615, 791): lambda *a: [_all_tuples(x) for x in a],
    (278,): lambda a: [tuple(tuple(x) if isinstance(x, list) else x for x in a)],
    (115,): lambda a: [[set(x) if isinstance(x, list) and x else {} for x in a]],
    (124,): lambda a, b: [float(a), complex(b)],
    (252,): lambda a: [complex(a)],
    (722,): lambda a, *b: [{key: tuple(x) for key, x in a.items()}, *b],
}
"""Types that JSON cannot represent, by MBPP problem number."""

_UNORDERED = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly"}
_UNORDERED |= {"larg_nnum", "intersection_array", "find_dissimilar", "Diff"}
_NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}


def evalplus_inputs(task_id: str, inputs: list[list]) -> list[list]:
    """Return lists of arguments with the tuples, sets and complex numbers that JSON lacks."""
    name, _, number = task_id.partition("/")
    forms = (form for tasks, form in _FORMS.items() if name == "Mbpp" and int(number) in tasks)
    form = next(forms, None)
    return [form(*each) for each in inputs] if form else inputs


def evalplus_compare(
    task_id: str, name: str, functions: tuple[Any, Any], inputs: list[list], tolerance: float
) -> None:
    """Raise unless the first function answers every input as the second, the reference, does.

    Skips an input that the reference itself rejects; EvalPlus would stop there.
    """
    program, reference = functions
    mbpp, compared = task_id.startswith("Mbpp/"), 0
    for arguments in evalplus_inputs(task_id, inputs):
        try:
            expected = reference(*copy.deepcopy(arguments))
        except Exception:
            continue
        compared += 1
        if mbpp and name in _NOT_NONE:
            expected = expected is not None
        value = program(*copy.deepcopy(arguments))
        if not mbpp and name == "find_zero":
            coefficients = enumerate(arguments[0])
            right = abs(sum(c * math.pow(value, i) for i, c in coefficients)) <= tolerance
        else:
            oracle = (name, arguments, value, expected, tolerance)
            equal = _mbpp_equal(*oracle) if mbpp else value == expected
            # Once floats are expected, the tolerance applies to all later inputs.
            tolerance = tolerance or (1e-6 if _floats(expected) else 0)
            right = equal or _close(value, expected, tolerance)
        assert right, f"{arguments!r} gives {value!r}"[:300]
    assert compared or not inputs, "the reference solution refuses every input"


def _close(value: Any, expected: Any, tolerance: float) -> bool:
    if not tolerance or type(value) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)) and len(value) != len(expected):
        return False
    import numpy

    return bool(numpy.allclose(value, expected, rtol=1e-7, atol=tolerance))


def _mbpp_equal(name: str, arguments: list, value: Any, expected: Any, tolerance: float) -> bool:
    """Whether an MBPP+ value is right; some problems have several right answers."""
    if name in _UNORDERED:
        return set(value) == set(expected)
    if name in _NOT_NONE:
        return value == expected if isinstance(value, bool) else expected == (value is not None)
    return (
        value == expected
        or name == "are_equivalent"
        or (name == "sum_div" and value == 0)
        or (name == "surface_Area" and abs(value - _surface(*arguments)) <= tolerance)
        or (name == "digit_distance_nums" and value == _digit_distance(*arguments))
    )


def _surface(edge: float, height: float) -> int:
    """Return the rounded surface of a pyramid from its vertical height."""
    return round(edge**2 + 4 * (edge * math.sqrt((edge / 2) ** 2 + height**2)) / 2)


def _digit_distance(one: int, other: int) -> int:
    first, second = str(one), str(other)
    size = max(len(first), len(second))
    pairs = zip(first.zfill(size), second.zfill(size), strict=True)
    return sum(abs(int(a) - int(b)) for a, b in pairs)


def _floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(each, float) for each in value)
    return isinstance(value, float) or str(getattr(value, "dtype", "")) in ("float32", "float64")
