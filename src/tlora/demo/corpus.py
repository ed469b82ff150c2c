"""Arithmetic word problems to which the demo adapts its embedded base model.

A row is `{"prompt": ..., "response": ...}`. Every prompt states one problem `(a, operation, b)` in
one of several forms and ends in `Answer:`. The response is the sum and its value, `30-14=16`.
`prompt + response` needs no separator, and the end-of-text token marks where a response stops.

One problem in ten, chosen by the problem itself, is held out: it appears in no training row of any
form, neither in pretraining nor in the training half of a task, so that a right answer on it is
computed and not remembered. Pretraining never shows the forms here; its own are in
`scripts/pretraining_corpus.py`. `ledger`, used by the demo: the question comes first, the change
before the opening stock, with an unrelated count among the facts. `spelled`: numbers as words.
`program`: a few lines of code with an irrelevant variable.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

Row = dict[str, str]

HELD_OUT_SHARE = 0.1
LIMIT = 100  # operands and answers stay below this limit

ITEMS = ("apples", "books", "coins", "eggs", "pens", "cups", "keys", "shells")
PLACES = ("box", "shop", "bag", "room")
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class Problem(NamedTuple):
    """Two positive operands and an operation: `+`, `-`, `max` or `min`."""

    a: int
    op: str
    b: int

    @property
    def answer(self) -> int:
        """The number at the end of a right response."""
        match self.op:
            case "+":
                return self.a + self.b
            case "-":
                return self.a - self.b
            case "max":
                return max(self.a, self.b)
            case "min":
                return min(self.a, self.b)
        raise ValueError(f"Problem: unknown operation {self.op!r}; use '+', '-', 'max' or 'min'")

    @property
    def working(self) -> str:
        """The response to a word problem: `30-14=16`, or just the answer for a comparison."""
        if self.op in ("+", "-"):
            return f"{self.a}{self.op}{self.b}={self.answer}"
        return str(self.answer)

    @property
    def held_out(self) -> bool:
        """Whether no training row may state this problem; a fixed property of the problem."""
        return random.Random(f"{self.a}{self.op}{self.b}").random() < HELD_OUT_SHARE


@cache
def problems(op: str, held_out: bool) -> tuple[Problem, ...]:
    """Return all problems of one operation on one side of the split, with operands 1 to 99.

    Sums stay below 100, differences above 0, and the two numbers compared differ.
    """
    allowed: Callable[[int, int], bool] = {
        "+": lambda a, b: a + b < LIMIT,
        "-": lambda a, b: a > b,
        "max": lambda a, b: a != b,
        "min": lambda a, b: a != b,
    }[op]
    pairs = ((a, b) for a in range(1, LIMIT) for b in range(1, LIMIT) if allowed(a, b))
    every = (Problem(a, op, b) for a, b in pairs)
    return tuple(problem for problem in every if problem.held_out == held_out)


def _ledger(problem: Problem, rng: random.Random) -> str:
    (item, other), place = rng.sample(ITEMS, 2), rng.choice(PLACES)
    change = {"+": "buys", "-": "sold"}[problem.op]
    facts = [f"{change} {problem.b} {item}", f"had {problem.a} {item}"]
    facts.insert(rng.randrange(3), f"gave away {rng.randrange(1, LIMIT)} {other}")
    return f"How many {item} now? The {place} book: {'; '.join(facts)}. Answer:"


def _spelled(problem: Problem, rng: random.Random) -> str:
    verb = {"+": "and", "-": "less"}[problem.op]
    return f"How much is {_in_words(problem.a)} {verb} {_in_words(problem.b)}? Answer:"


def _in_words(number: int) -> str:
    if number < len(_SMALL):
        return _SMALL[number]
    tens, ones = _TENS[number // 10 - 2], number % 10
    return f"{tens}-{_SMALL[ones]}" if ones else tens


def _program(problem: Problem, rng: random.Random) -> str:
    asked, other = rng.sample("abcdefgh", 2)
    lines = [f"{asked} = {problem.a}", f"{asked} {problem.op}= {problem.b}"]
    lines.insert(rng.randrange(3), f"{other} = {rng.randrange(1, LIMIT)}")
    return f"{'; '.join(lines)}; print({asked}). Answer:"


class Form(NamedTuple):
    """One way to word a problem: the operations it can state, and its share of pretraining."""

    operations: tuple[str, ...]
    write: Callable[[Problem, random.Random], str]
    share: float = 1.0
    told: bool = True
    """Whether the response shows the calculation and not only its result."""


SHIFTED: dict[str, Form] = {
    "ledger": Form(("+", "-"), _ledger),
    "spelled": Form(("+", "-"), _spelled),
    "program": Form(("+", "-"), _program),
}
"""The forms that pretraining never shows."""


def row(form: Form, held_out: bool, rng: random.Random) -> Row:
    """Return a row of one form."""
    problem = rng.choice(problems(rng.choice(form.operations), held_out))
    response = problem.working if form.told else str(problem.answer)
    return {"prompt": form.write(problem, rng), "response": response}


def distinct(form: Form, held_out: bool, count: int, rng: random.Random) -> list[Row]:
    """Return `count` rows with `count` different prompts."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        made = row(form, held_out, rng)
        rows.setdefault(made["prompt"], made)
    return list(rows.values())


def shifted_task(
    seed: int, train: int = 2000, test: int = 200, form: str = "ledger"
) -> tuple[list[Row], list[Row]]:
    """Return the task to adapt to: `(train rows, test rows)` of a shifted form.

    The two share no problem `(a, operation, b)`: training rows use problems that are not held out,
    test rows use held-out ones. Every prompt is unique.
    """
    rng, shifted = random.Random(f"shifted {seed}"), SHIFTED[form]
    return distinct(shifted, False, train, rng), distinct(shifted, True, test, rng)
