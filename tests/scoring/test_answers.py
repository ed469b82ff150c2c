import subprocess
import sys

import pytest

from tlora.scoring.answers import PROTOCOLS, after_mark, math_answer, math_verdicts

EXTRACTED = [
    ("answer-is", "It is 3.\nThe answer is: $1,024.", "$1,024"),
    ("answer-is", "The answer is: 3. No. The answer is: 4", "4"),
    ("answer-is", "The answer is: 5 apples.\nThere are 7 left.", "5"),
    ("answer-is", "#### 72", None),
    ("answer-is", "It is 72", None),
    ("answer-is", "The answer is: none", None),
    ("metamath-gsm8k", "The answer is: 1,450,000", "1450"),
    ("metamath-gsm8k", "The answer is: 2.6", "3"),
    ("metamath-gsm8k", "The answer is: 7/2", "4"),
    ("metamath-gsm8k", "The answer is: 7/0", "7"),
    ("metamath-gsm8k", "The answer is: " + "9" * 400, None),
    ("metamath-gsm8k", "72", None),
    ("gsm8k", "48/2 = <<48/2=24>>24\n#### 1,024", "1,024"),
    ("gsm8k", "#### -10\n\nQuestion: more?\n#### 5", "-10"),
    ("gsm8k", "#### $12.", "12"),
    ("gsm8k", "The answer is: 72", None),
    ("gsm8k-last-number", "First 3, then 4 of 5.", "5"),
    ("gsm8k-last-number", "none", None),
    ("llm-adapters-number", "has 1,000 and 7.", "7."),
    ("llm-adapters-number", "it is -3", "-3"),
    ("llm-adapters-letter", "the answer is (C).", "C"),
    ("true-false", "the correct answer is true, not false", "true"),
    ("true-false", "True", None),
    ("solution", "the correct answer is solution2", "solution2"),
    ("answer", "answer3, not answer1", "answer3"),
    ("answer", "answer6", None),
    ("ending", "the correct answer is ending4", "ending4"),
    ("option", "the correct answer is option1", "option1"),
    ("option", "solution1", None),
    ("math", r"so $\boxed{\frac{1}{2}}$. The answer is: \frac{3}{4}.", r"\frac{3}{4}"),
    ("math", r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    ("math", r"The answer is: $\boxed{7}$", "7"),
    ("math", "it is 7", None),
]


@pytest.mark.parametrize(("name", "text", "answer"), EXTRACTED)
def test_the_answer_is_where_the_protocol_says(name, text, answer):
    assert PROTOCOLS[name].extract(text) == answer


@pytest.mark.parametrize(
    ("name", "text", "reference", "right"),
    [
        ("answer-is", "The answer is: 18.00", "18", True),
        ("answer-is", "The answer is: 17.6", "18", False),
        ("metamath-gsm8k", "The answer is: 17.6", "18", True),
        ("answer-is", "The answer is: 1024", "1,024", True),
        ("gsm8k", "#### 5.0", "5", True),
        ("gsm8k", "5", "5", False),
        ("gsm8k-last-number", "so 5", "5", True),
        ("llm-adapters-number", "The answer is 1.8333.", "1.8333333333333335", True),
        ("llm-adapters-number", "The answer is 1.832.", "1.8333333333333335", False),
        ("llm-adapters-letter", "(C)", "D", False),
        ("true-false", "the correct answer is false", "true", False),
        ("math", r"$\boxed{0.5}$", r"\frac12", True),
        ("math", r"$\boxed{0.25}$", r"\frac14", False),
    ],
)
def test_right_and_wrong(name, text, reference, right):
    assert PROTOCOLS[name].score(text, reference) is right


@pytest.mark.parametrize("name", PROTOCOLS)
def test_no_answer_is_never_right(name):
    for text in ("", "The answer is: ", "\\boxed{", "####", "I do not know."):
        assert PROTOCOLS[name].extract(text) is None
        assert not PROTOCOLS[name].score(text, "")


class Says:
    """Stands in for math-verify with a verdict of its own."""

    def __init__(self, verdict):
        self.verdict = verdict

    def equal(self, answer, reference):
        return self.verdict


def test_both_rules_of_math_are_reported():
    text = r"$\boxed{0.25}$"
    assert math_verdicts(text, r"\frac14", Says(True)) == {"string": False, "symbolic": True}
    assert math_verdicts(text, "0.25", Says(False)) == {"string": True, "symbolic": False}
    assert math_verdicts("none", "0.25", Says(True)) == {"string": False, "symbolic": False}


def test_the_string_decides_where_math_verify_cannot():
    assert math_verdicts(r"\boxed{a b}", "ab", Says(None)) == {"string": True, "symbolic": True}
    assert math_verdicts(r"\boxed{a b}", "ba", Says(None)) == {"string": False, "symbolic": False}


def test_a_full_stop_inside_the_answer_does_not_end_it():
    assert after_mark("The answer is: 3.5.\nNext") == "3.5"
    assert math_answer("The answer is: (1, 2.5).") == "(1, 2.5)"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, pkgutil, importlib, tlora.scoring as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'tlora.scoring.{module.name}')\n"
        "print(*[n for n in ('torch', 'transformers', 'numpy', 'sympy') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []
