"""Arithmetic in plain words: what the embedded base model is trained on, and adapted to.

A row is `{"prompt": ..., "response": ...}`. Every prompt states one problem `(a, operation, b)`
in one of several surface forms and ends in `=` or `Answer:`. The response to a bare sum is its
value, to a comparison the number asked for, and to a sum told in words the sum and its value,
`30-14=16`: reading is then learnt apart from reckoning, which all forms share. `prompt + response`
needs no separator, and the end-of-text token marks where a response stops.

Two things are kept apart:

* problems: one in ten, chosen by the problem itself, is held out. A held-out problem appears in no
  training row of any form, neither in pretraining nor in the training half of the shifted task,
  so that a right answer on it is computed and not remembered;
* forms: the shifted forms are never seen in pretraining. They use the operations the base knows,
  worded as it has not met them. `ledger`, the demo's: the question comes first, the change before
  the opening stock, and a count of something else stands among the facts. `spelled`: numbers are
  written as words. `program`: a few lines of code, one variable of which is not asked for.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

Row = dict[str, str]

HELD_OUT_SHARE = 0.1
LIMIT = 100  # operands and answers stay below it

NAMES = ("Tom", "Mia", "Sam", "Ann", "Leo", "Eva", "Max", "Zoe")
ITEMS = ("apples", "books", "coins", "eggs", "pens", "cups", "keys", "shells")
COLOURS = ("red", "blue", "green", "white")
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
        """The number a right response ends in."""
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
        """The response to a problem told in words: `30-14=16`, or for a comparison the answer."""
        if self.op in ("+", "-"):
            return f"{self.a}{self.op}{self.b}={self.answer}"
        return str(self.answer)

    @property
    def held_out(self) -> bool:
        """Whether no training row may state this problem; a fixed property of the problem."""
        return random.Random(f"{self.a}{self.op}{self.b}").random() < HELD_OUT_SHARE


@cache
def problems(op: str, held_out: bool) -> tuple[Problem, ...]:
    """All problems of one operation, on one side of the split, with operands from 1 to 99.

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


def _symbols(problem: Problem, rng: random.Random) -> str:
    return f"{problem.a}{problem.op}{problem.b}="


def _words(problem: Problem, rng: random.Random) -> str:
    word = {"+": "plus", "-": "minus"}[problem.op]
    return f"What is {problem.a} {word} {problem.b}? Answer:"


def _compare(problem: Problem, rng: random.Random) -> str:
    word = {"max": "larger", "min": "smaller"}[problem.op]
    return f"Which is {word}, {problem.a} or {problem.b}? Answer:"


def _gain(problem: Problem, rng: random.Random) -> str:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    return (
        f"{name} has {problem.a} {item}. {name} buys {problem.b} more. "
        f"How many {item} does {name} have now? Answer:"
    )


def _pool(problem: Problem, rng: random.Random) -> str:
    (first, second), item, place = rng.sample(COLOURS, 2), rng.choice(ITEMS), rng.choice(PLACES)
    return (
        f"There are {problem.a} {first} and {problem.b} {second} {item} in the {place}. "
        f"How many {item} are in the {place}? Answer:"
    )


def _loss(problem: Problem, rng: random.Random) -> str:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    return (
        f"{name} had {problem.a} {item} and gave away {problem.b}. "
        f"How many {item} are left? Answer:"
    )


def _sold(problem: Problem, rng: random.Random) -> str:
    item, place = rng.choice(ITEMS), rng.choice(PLACES)
    return (
        f"The {place} sold {problem.b} of its {problem.a} {item}. "
        f"How many {item} are left in the {place}? Answer:"
    )


def _gap(problem: Problem, rng: random.Random) -> str:
    (first, second), item = rng.sample(NAMES, 2), rng.choice(ITEMS)
    return (
        f"{first} has {problem.a} {item}. {second} has {problem.b} {item}. "
        f"How many more {item} does {first} have? Answer:"
    )


def _mixed(problem: Problem, rng: random.Random) -> str:
    (item, other), place = rng.sample(ITEMS, 2), rng.choice(PLACES)
    stock = [f"{problem.a} {item}", f"{rng.randrange(1, LIMIT)} {other}"]
    rng.shuffle(stock)
    change = {"+": "buys", "-": "sold"}[problem.op]
    return (
        f"There are {stock[0]} and {stock[1]} in the {place}. The {place} {change} "
        f"{problem.b} {item}. How many {item} are in the {place} now? Answer:"
    )


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


FORMS: dict[str, Form] = {
    "symbols": Form(("+", "-"), _symbols, share=2.0),
    "words": Form(("+", "-"), _words),
    "compare": Form(("max", "min"), _compare),
    "gain": Form(("+",), _gain),
    "pool": Form(("+",), _pool),
    "loss": Form(("-",), _loss),
    "sold": Form(("-",), _sold),
    "gap": Form(("-",), _gap),
    "mixed": Form(("+", "-"), _mixed),
}
"""The forms of pretraining. The bare one gets a larger share: it carries the arithmetic."""

SHIFTED: dict[str, Form] = {
    "ledger": Form(("+", "-"), _ledger),
    "spelled": Form(("+", "-"), _spelled),
    "program": Form(("+", "-"), _program),
}
"""The forms that pretraining never shows."""


def _row(form: Form, held_out: bool, rng: random.Random) -> Row:
    problem = rng.choice(problems(rng.choice(form.operations), held_out))
    response = str(problem.answer) if form.write is _symbols else problem.working
    return {"prompt": form.write(problem, rng), "response": response}


def _distinct(form: Form, held_out: bool, count: int, rng: random.Random) -> list[Row]:
    """`count` rows with `count` different prompts."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = _row(form, held_out, rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def pretraining_rows(seed: int, names: Iterable[str] = tuple(FORMS)) -> Iterator[Row]:
    """Rows of the named forms without end, in their shares, no held-out problem among them."""
    rng = random.Random(f"pretraining {seed}")
    forms = [FORMS[name] for name in names]
    shares = [form.share for form in forms]
    while True:
        yield _row(rng.choices(forms, shares)[0], held_out=False, rng=rng)


def held_out_rows(form: str, seed: int, count: int) -> list[Row]:
    """`count` different rows of one pretraining form, all stating held-out problems."""
    return _distinct(FORMS[form], True, count, random.Random(f"held out {form} {seed}"))


def shifted_task(
    seed: int, train: int = 2000, test: int = 200, form: str = "ledger"
) -> tuple[list[Row], list[Row]]:
    """The task to adapt to: `(train rows, test rows)` of a shifted form.

    The two halves share no problem `(a, operation, b)`: training rows are drawn from the problems
    that are not held out, test rows from those that are. No prompt occurs twice.
    """
    rng, shifted = random.Random(f"shifted {seed}"), SHIFTED[form]
    return _distinct(shifted, False, train, rng), _distinct(shifted, True, test, rng)
