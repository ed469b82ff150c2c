import pytest

from tlora.evaluation.evalplus import agree, alike


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "same"),
    [
        (3, 3, 0, True),
        (3, 4, 0, False),
        (3, 3.0, 0, True),
        (0.1 + 0.2, 0.3, 0, True),
        (0.3001, 0.3, 0, False),
        (0.3001, 0.3, 1e-3, True),
        (1e9 + 1, 1e9, 0, True),
        ([1, 0.1 + 0.2], [1, 0.3], 0, True),
        ([1, 0.3], [1, 0.3, 0.3], 0, False),
        ((0.1 + 0.2,), [0.3], 0, False),
        ([[0.1 + 0.2], "a"], [[0.3], "a"], 0, True),
        ([[0.1 + 0.2], "b"], [[0.3], "a"], 0, False),
        ({1, 2}, {2, 1}, 0, True),
        (None, 0.0, 1.0, False),
        ("0.3", 0.3, 1.0, False),
        (float("nan"), 0.3, 1.0, False),
    ],
)
def test_values_are_alike(value, expected, tolerance, same):
    assert alike(value, expected, tolerance) is same


def test_an_input_that_the_reference_refuses_is_left_out():
    agree(lambda x: x + 1, lambda x: x + 1, [[1], ["one"]], 0)


def test_a_program_has_to_answer_where_the_reference_does():
    with pytest.raises(AssertionError, match=r"\[2\] gives 2"):
        agree(lambda x: 2, lambda x: x * 1 + (x > 1), [[2]], 0)
    with pytest.raises(ZeroDivisionError):
        agree(lambda x: 1 / 0, lambda x: x, [[1]], 0)


def test_a_reference_that_answers_nothing_shows_nothing():
    with pytest.raises(AssertionError, match="refuses every input"):
        agree(lambda x: x, lambda x: 1 / 0, [[1], [2]], 0)


def test_an_input_that_a_program_changes_is_whole_for_the_other():
    def popping(x):
        return x.pop()

    agree(popping, popping, [[[1, 2]], [[1, 2]]], 0)
    inputs = [[[1, 2]]]
    agree(popping, popping, inputs, 0)
    assert inputs == [[[1, 2]]]
