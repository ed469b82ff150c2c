"""The arithmetic on curves of score against learning rate, with numbers that are done by hand."""

from __future__ import annotations

import pytest

from tlora.compare.ratecurve import best_rate, geometric_median, width

CURVE = {1e-3: 2.0, 1e-2: 1.0, 1e-1: 4.0}
DIVERGED = {1e-3: 2.0, 1e-2: 1.0, 1e-1: None}


def test_the_best_rate_has_the_lowest_loss_or_the_highest_score_and_is_the_lowest_of_equals():
    assert best_rate(CURVE, "lower") == 1e-2
    assert best_rate(CURVE, "higher") == 1e-1
    assert best_rate({3e-2: 1.0, 1e-2: 1.0, 1e-3: None}, "lower") == 1e-2
    assert best_rate({1e-2: None}, "lower") is None


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([1e-3, 1e-2, 1e-1], 1e-2),
        ([1e-3, 1e-1], 1e-2),
        ([1e-3, 1e-3, 1e-1], 1e-3),
        ([1e-3, 3e-3], 1.73e-3),
        ([0.1 + 0.2, 0.1 + 0.2], 0.1 + 0.2),
        ([1 / 3, 1e-5, 1e5], 1 / 3),
    ],
)
def test_the_geometric_median_is_a_rate_that_was_tried_or_has_three_digits(rates, expected):
    assert geometric_median(rates) == geometric_median(rates[::-1]) == expected


def test_the_width_ends_where_the_score_is_five_percent_worse_than_the_best():
    # 1.05 is crossed 5 % of the decade below the best, and 1/60 of the decade above it.
    assert width(CURVE, "lower") == (pytest.approx(10 ** (0.05 + 0.05 / 3)), False)
    mirrored = {rate: 2.0 - score / 10 for rate, score in CURVE.items()}  # 1.8, 1.9, 1.6
    factor = pytest.approx(10 ** (0.095 / 0.1 + 0.095 / 0.3))
    assert width(mirrored, "higher") == (factor, False)


def test_five_percent_of_a_negative_score_is_worse_than_it():
    turned = {rate: -score for rate, score in CURVE.items()}
    assert width(turned, "higher") == width(CURVE, "lower")


def test_a_score_that_is_exactly_at_the_limit_is_the_end():
    curve = {1e-3: 22.0, 1e-2: 20.0, 1e-1: 21.0, 1.0: 30.0}
    # Half of the decade below the best, and the whole one above it.
    assert width(curve, "lower") == (pytest.approx(10**1.5), False)


def test_the_width_says_when_the_rates_that_were_tried_end_first():
    assert width({1e-3: 1.0, 1e-2: 1.04}, "lower") == (pytest.approx(10), True)
    assert width({1e-3: 1.0, 1e-2: 1.1}, "lower") == (pytest.approx(10**0.5), True)  # open below


def test_a_rate_that_diverged_ends_the_width():
    assert width(DIVERGED, "lower") == (pytest.approx(10**0.05), False)


def test_one_rate_no_score_and_a_best_score_of_zero_have_no_width():
    assert width({1e-3: 1.0}, "lower") is None
    assert width({1e-3: None, 1e-2: None}, "lower") is None
    assert width({1e-3: 0.0, 1e-2: 0.0}, "higher") is None
