"""The generated corpus: right answers, fixed by the seed, and the two halves kept apart."""

import re
from itertools import chain, islice

import pytest

from pretraining_corpus import FORMS, held_out_rows, pretraining_rows
from tlora.demo.corpus import SHIFTED, Problem, Row, problems, shifted_task

READERS = {
    r"(\d+)\+(\d+)=": lambda a, b: a + b,
    r"(\d+)-(\d+)=": lambda a, b: a - b,
    r"What is (\d+) plus (\d+)\?": lambda a, b: a + b,
    r"What is (\d+) minus (\d+)\?": lambda a, b: a - b,
    r"Which is larger, (\d+) or (\d+)\?": max,
    r"Which is smaller, (\d+) or (\d+)\?": min,
    r"(?:\w+) has (\d+) \w+\. \w+ buys (\d+) more\.": lambda a, b: a + b,
    r"There are (\d+) \w+ and (\d+) \w+ \w+ in": lambda a, b: a + b,
    r"\w+ had (\d+) \w+ and gave away (\d+)\.": lambda a, b: a - b,
    r"The \w+ sold (\d+) of its (\d+) \w+\.": lambda b, a: a - b,
    r"\w+ has (\d+) \w+\. \w+ has (\d+) \w+\. How many more": lambda a, b: a - b,
}
"""A second reading of each pretraining form but `mixed`: the operands in order, the operation."""


def read_mixed(prompt: str) -> int | None:
    """The answer to a prompt of the form `mixed`, or None when it is another form."""
    change = re.search(r"The \w+ (buys|sold) (\d+) (\w+)\. How many \3 are", prompt)
    if change is None:
        return None
    verb, amount, item = change.groups()
    (stock,) = re.findall(rf"(\d+) {item}\b", prompt.split(".", maxsplit=1)[0])
    return int(stock) + (1 if verb == "buys" else -1) * int(amount)


def read_pretraining(prompt: str) -> int:
    """The answer, from the wording alone."""
    if (mixed := read_mixed(prompt)) is not None:
        return mixed
    (answer,) = {
        compute(*map(int, match.groups()))
        for pattern, compute in READERS.items()
        if (match := re.match(pattern, prompt))
    }
    return answer


def read_ledger(prompt: str) -> int:
    """The answer to a prompt of the form `ledger`, from the wording alone."""
    item = re.match(r"How many (\w+) now\?", prompt)[1]
    (stock,) = re.findall(rf"had (\d+) {item}\b", prompt)
    ((verb, amount),) = re.findall(rf"(buys|sold) (\d+) {item}\b", prompt)
    return int(stock) + (1 if verb == "buys" else -1) * int(amount)


def read_spelled(prompt: str) -> int:
    """The same of `spelled`."""
    a, verb, b = re.fullmatch(r"How much is (\S+) (and|less) (\S+)\? Answer:", prompt).groups()
    return value_of(a) + (1 if verb == "and" else -1) * value_of(b)


def value_of(words: str) -> int:
    """The number below 100 that is written in words."""
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    ones += " fifteen sixteen seventeen eighteen nineteen"
    tens = "twenty thirty forty fifty sixty seventy eighty ninety"
    values = {word: n for n, word in enumerate(ones.split())}
    values |= {word: 10 * n for n, word in enumerate(tens.split(), start=2)}
    return sum(values[word] for word in words.split("-"))


def read_program(prompt: str) -> int:
    """The same of `program`: it is run."""
    *lines, shown = prompt.removesuffix(". Answer:").split("; ")
    variables: dict[str, int] = {}
    for line in lines:
        name, sign, number = re.fullmatch(r"(\w) ([+-]?)= (\d+)", line).groups()
        before = variables[name] if sign else 0
        variables[name] = before + int(f"{sign}{number}")
    return variables[re.fullmatch(r"print\((\w)\)", shown)[1]]


SHIFTED_READERS = {"ledger": read_ledger, "spelled": read_spelled, "program": read_program}


def shape(prompt: str) -> str:
    """The first words of a prompt with its numbers blanked: enough to tell forms apart."""
    return " ".join(re.sub(r"\d+", "#", prompt).split()[:4])


def stated(row: Row) -> int:
    """The number a response ends in, after checking the sum it shows, if it shows one."""
    *working, answer = row["response"].split("=")
    for shown in working:
        a, op, b = re.fullmatch(r"(\d+)([+-])(\d+)", shown).groups()
        assert int(answer) == (int(a) + int(b) if op == "+" else int(a) - int(b)), row
    return int(answer)


def test_pretraining_is_right_and_shows_no_held_out_problem_and_no_shifted_form() -> None:
    held_out = {problem.working for op in "+-" for problem in problems(op, held_out=True)}
    assert 800 < len(held_out) < 1200
    shapes = {shape(shifted_task(0, 0, 1, form)[1][0]["prompt"]) for form in SHIFTED}
    for row in islice(pretraining_rows(0), 5000):
        assert read_pretraining(row["prompt"]) == stated(row), row
        told = row["prompt"].endswith("Answer:")
        assert (row["response"] if told else row["prompt"] + row["response"]) not in held_out, row
        assert shape(row["prompt"]) not in shapes


@pytest.mark.parametrize("form", SHIFTED)
def test_shifted_answers_are_right_and_no_prompt_comes_twice(form: str) -> None:
    rows = [*chain(*shifted_task(0, form=form))]
    for row in rows:
        assert SHIFTED_READERS[form](row["prompt"]) == stated(row), row
    assert len({row["prompt"] for row in rows}) == len(rows) == 2200
    train, test = ({row["response"] for row in half} for half in shifted_task(0, form=form))
    assert train.isdisjoint(test)
    assert train.isdisjoint(row["response"] for row in shifted_task(1, 1, form=form)[1])


def test_the_seed_alone_decides() -> None:
    assert shifted_task(3, 50, 10) == shifted_task(3, 50, 10)
    assert shifted_task(3, 50, 10) != shifted_task(4, 50, 10)
    assert list(islice(pretraining_rows(3), 50)) == list(islice(pretraining_rows(3), 50))
    assert list(islice(pretraining_rows(3), 50)) != list(islice(pretraining_rows(4), 50))


@pytest.mark.parametrize("form", FORMS)
def test_held_out_rows_differ_and_are_right(form: str) -> None:
    rows = held_out_rows(form, 0, 20)
    assert len({row["prompt"] for row in rows}) == 20
    assert all(read_pretraining(row["prompt"]) == stated(row) for row in rows)


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown operation '\*'"):
        _ = Problem(2, "*", 3).answer
