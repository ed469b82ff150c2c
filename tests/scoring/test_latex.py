import pytest

from tlora.scoring.latex import boxed, normalized, same_string

BOXES = [
    (r"so $\boxed{72}$.", "72"),
    (r"$\boxed{\frac{1}{\sqrt{2}}}$ and more", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"$\boxed{\left\{1,2\right.}$ not }", r"\left\{1,2\right."),
    (r"$\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}$", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\fbox{no}", "no"),
    (r"$\boxed 5$ apples", "5"),
    (r"$\boxed{5", None),
    (r"$\boxed{}$", None),
    ("no box", None),
    (r"\boxedx{5}", None),
]


@pytest.mark.parametrize(("text", "held"), BOXES)
def test_the_last_box_with_its_nested_braces(text, held):
    assert boxed(text) == held


SAME = [
    (r"\dfrac{3}{4}", r"\frac34"),
    (r"\tfrac{3}{4}", "3/4"),
    ("0.5", r"\frac{1}{2}"),
    (".79", "0.79"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{1}2", r"\frac{1}{2}"),
    (r"\left( 1, \frac{3}{2} \right)", r"(1,\frac32)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$15.48", "15.48"),
    (r"25\%", "25"),
    (r"575\text{ students}", "575"),
    (r"12 \mbox{ cm}^2", "12"),
    (r"\text{even}", "even"),
    (r"\text{(A)}", "(A)"),
    ("x = 5", "5"),
    ("100,000", "100000"),
    (r"1{,}000", "1000"),
    (r"10,\!000", "10000"),
    ("$5$", "5"),
    ("5.", "5"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_one_answer_are_the_same(one, other):
    assert same_string(one, other)


DIFFERENT = [
    ("5", "-5"),
    ("5", "50"),
    (r"\frac{3}{4}", r"\frac{4}{3}"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("1,2", "12"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    (r"\text{even}", r"\text{odd}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 12 \end{pmatrix}"),
    ("x^2+5", "x^2+6"),
    ("0.25", r"\frac{1}{4}"),  # the lineage's rule knows 0.5 alone
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers_stay_different(one, other):
    assert not same_string(one, other)


def test_rows_of_a_matrix_are_kept_apart():
    assert normalized(r"\begin{pmatrix} 0 \\ 1/11 \end{pmatrix}") == (
        r"\begin{pmatrix}0\\1/11\end{pmatrix}"
    )
