"""Rows of word problems: each question once, equations in one form, a fixed split."""

from __future__ import annotations

import pytest


@pytest.fixture
def equations(script):
    return script("quality", "equations")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("X=(7.0+8.0)", "x=7+8"),
        ("x=7+8", "x=7+8"),
        ("X=((22.0-14.0)/4.0)", "x=(22-14)/4"),
        ("x=(12.0+13.0)/(6.0-1.0)", "x=(12+13)/(6-1)"),
        ("X=130.30+10.05", "x=130.30+10.05"),
        ("(7.0*x) + 4.0=(3.0*x)", "(7*x)+4=3*x"),
    ],
)
def test_an_equation_is_written_in_one_form(equations, given, written):
    assert equations.one_form(given) == written


def test_a_question_is_kept_once_whatever_its_case_and_marks(equations):
    problems = [
        {"original_text": "How  many ?", "equation": "x=1"},
        {"original_text": "how many?", "equation": "x=2"},
        {"original_text": "How much ?", "equation": "x=3"},
    ]
    assert equations.rows(problems) == [
        {"prompt": "How many ?", "response": "x=1"},
        {"prompt": "How much ?", "response": "x=3"},
    ]


def test_the_split_is_fixed_and_has_every_row_on_one_side(equations):
    rows = [{"prompt": str(number)} for number in range(1000)]
    train, test = equations.split(rows)
    assert (train, test) == equations.split(rows)
    assert len(test) == 300
    assert sorted(int(row["prompt"]) for row in train + test) == [*range(1000)]
