import numpy as np
import pytest
from scipy import stats

from tlora.compare.ratecurve import best_rate
from tlora.compare.trials import mean_scores
from tlora.report.intervals import difference, holm, interval


def test_the_interval_is_students():
    values = [0.81, 0.83, 0.80, 0.86, 0.82]
    found = interval(values)
    # Printed tables: t of 0.975 at four degrees of freedom is 2.776.
    assert found.half == pytest.approx(2.776 * np.std(values, ddof=1) / 5**0.5, rel=1e-3)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.mean == pytest.approx(0.824)


def test_one_seed_has_no_interval():
    assert interval([0.5]).half is None
    assert interval([0.5]).mean == 0.5


def test_the_difference_is_the_paired_t_test_over_common_seeds():
    first = {1: 0.81, 2: 0.84, 3: 0.80, 4: 0.86, 9: 0.1}
    second = {1: 0.79, 2: 0.83, 3: 0.76, 4: 0.83, 8: 0.9}
    found = difference(first, second, "higher")
    pairs = [[s[seed] for seed in (1, 2, 3, 4)] for s in (first, second)]
    test = stats.ttest_rel(*pairs)
    assert found.p == pytest.approx(test.pvalue)
    ends = test.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((ends.low, ends.high))
    assert found.interval.count == 4
    assert found.better == 1
    assert difference(second, first, "higher").better == -1
    assert difference(first, second, "lower").better == -1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.81, 0.84, 0.80], [0.80, 0.85, 0.80]),  # zero is inside
        ([0.9, 0.801], [0.5, 0.4]),  # two pairs, however alike
        ([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]),  # no spread
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    ],
)
def test_what_the_noise_could_have_done_is_a_tie(first, second):
    assert difference(dict(enumerate(first)), dict(enumerate(second)), "higher").better == 0


def test_methods_without_a_common_seed_are_not_compared():
    assert difference({1: 0.5}, {2: 0.5}, "higher") is None


def test_holm_is_the_step_down_rule():
    # Holm's own kind of example: 0.01 <= 0.05 / 4, 0.013 <= 0.05 / 3, 0.04 > 0.05 / 2.
    assert holm([0.01, 0.04, 0.013, 0.03]) == [True, False, True, False]
    assert holm([0.03, 0.01]) == [True, True]
    assert holm([0.06, 0.001, 0.001]) == [False, True, True]
    assert holm([]) == []


def test_equal_methods_win_in_five_percent_of_the_cases_or_fewer():
    """Scores of 872 rows, as an accuracy has them: rounded, and sharing the seed's own luck."""
    generator = np.random.default_rng(0)
    pairs, wins = 1000, 0
    for _ in range(pairs):
        luck = generator.normal(0, 0.01, size=5)
        first, second = (np.round((0.8 + luck + generator.normal(0, 0.005, 5)) * 872) for _ in "ab")
        found = difference(dict(enumerate(first)), dict(enumerate(second)), "higher")
        wins += found.better != 0
    # Three standard errors of a share of 0.05 above it.
    assert wins / pairs < 0.05 + 3 * (0.05 * 0.95 / pairs) ** 0.5
    assert wins > 0


def test_the_rate_with_the_best_mean_is_chosen():
    scores = {1e-3: [0.7, 0.9], 1e-2: [0.85, 0.85], 1e-1: [0.2, 0.99]}
    assert best_rate(mean_scores(scores, 2), "higher") == 1e-2
    assert best_rate(mean_scores(scores, 2), "lower") == 1e-1
    assert mean_scores(scores, 2)[1e-3] == pytest.approx(0.8)


def test_of_equal_means_the_lower_rate_is_chosen():
    scores = {1e-2: [0.8, 0.9], 1e-3: [0.9, 0.8], 1e-4: [0.1, 0.2]}
    assert best_rate(mean_scores(scores, 2), "higher") == 1e-3
    assert best_rate(mean_scores({1e-2: [0.5], 1e-3: [0.5]}, 1), "lower") == 1e-3


def test_a_rate_with_a_failed_seed_is_not_chosen():
    scores = {1e-3: [0.7, 0.7], 1e-2: [0.9, None], 1e-1: [0.9]}
    assert best_rate(mean_scores(scores, 2), "higher") == 1e-3
    assert best_rate(mean_scores({1e-2: [None, None]}, 2), "higher") is None
    assert best_rate(mean_scores({}, 2), "higher") is None
