"""Arithmetic word problems for pretraining the embedded base model.

Rows are those of `tlora.demo.corpus`, in other forms. The response to a bare sum is its value, to
a comparison the requested number, and to a word problem the sum and its value: this separates
reading from arithmetic, which all forms share. No row has a held-out problem.
"""

import random
from collections.abc import Iterable, Iterator

from tlora.demo.corpus import ITEMS, LIMIT, PLACES, Form, Problem, Row, distinct, row

NAMES = ("Tom", "Mia", "Sam", "Ann", "Leo", "Eva", "Max", "Zoe")
COLORS = ("red", "blue", "green", "white")


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
    (first, second), item, place = rng.sample(COLORS, 2), rng.choice(ITEMS), rng.choice(PLACES)
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


FORMS: dict[str, Form] = {
    "symbols": Form(("+", "-"), _symbols, share=2.0, told=False),
    "words": Form(("+", "-"), _words),
    "compare": Form(("max", "min"), _compare),
    "gain": Form(("+",), _gain),
    "pool": Form(("+",), _pool),
    "loss": Form(("-",), _loss),
    "sold": Form(("-",), _sold),
    "gap": Form(("-",), _gap),
    "mixed": Form(("+", "-"), _mixed),
}
"""The forms of pretraining; the bare one has a larger share because it teaches arithmetic."""


def pretraining_rows(seed: int, names: Iterable[str] = tuple(FORMS)) -> Iterator[Row]:
    """Yield endless rows of the named forms by share, without held-out problems."""
    rng = random.Random(f"pretraining {seed}")
    forms = [FORMS[name] for name in names]
    shares = [form.share for form in forms]
    while True:
        yield row(rng.choices(forms, shares)[0], held_out=False, rng=rng)


def held_out_rows(form: str, seed: int, count: int) -> list[Row]:
    """Return `count` distinct rows of one pretraining form, all with held-out problems."""
    return distinct(FORMS[form], True, count, random.Random(f"held out {form} {seed}"))
