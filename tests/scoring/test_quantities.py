from fractions import Fraction

import pytest

from tlora.scoring.quantities import first_number, last_number, same_number, value

READ = [
    ("72", 72),
    ("-3", -3),
    ("\u22125", -5),
    ("- 5", -5),
    ("+5", 5),
    ("1,234,567 people", 1234567),
    ("$1,234.50.", Fraction(2469, 2)),
    ("-$3", -3),
    ("$-3", -3),
    (r"\$15.48", Fraction(1548, 100)),
    ("€7", 7),
    ("50%", 50),
    ("5.", 5),
    ("5.0", 5),
    (".5", Fraction(1, 2)),
    ("x = .5", Fraction(1, 2)),
    ("3/4", Fraction(3, 4)),
    ("-3/4 of it", Fraction(-3, 4)),
    ("1 1/2 cups", Fraction(3, 2)),
    (r"$\frac{-3}{4}$", Fraction(-3, 4)),
    (r"-\dfrac{3}{4}", Fraction(-3, 4)),
    ("1e3", 1000),
    ("25 - 7", 25),
    ("8 km in 2 h", 8),
]


@pytest.mark.parametrize(("text", "expected"), READ)
def test_a_number_is_read_exactly(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    "text", ["", "no", "-", "12,50", "1,2345", "1:30", "3/0", r"\frac{1}{0}", "9" * 5000]
)
def test_what_is_malformed_is_no_number(text):
    assert value(text) is None


def test_a_malformed_number_does_not_give_way_to_a_later_one():
    assert first_number("12,50 or 13") is None
    assert first_number("about 13 or 12,50") == "13"


def test_an_exponent_of_many_digits_is_not_computed():
    assert value("1e999999999") is None


def test_the_last_number_is_the_last_well_formed_one():
    assert last_number("3 apples, 4 pears, $5.50 in all.") == "$5.50"
    assert last_number("25 - 7") == last_number("25-7") == "7"
    assert last_number("= -7") == "-7"
    assert last_number("none") is None


def test_equality_is_exact():
    assert same_number("0.30", "3/10")
    assert not same_number("0.3000001", "3/10")
    assert not same_number("1/3", "0.333333333333333333")
    assert same_number(f"{10**20 + 1}", f"{10**20 + 1}.0")
    assert not same_number(f"{10**20 + 1}", f"{10**20}")
    assert not same_number("none", "none")
