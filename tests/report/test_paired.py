"""What may be said of two models on the same items."""

import numpy as np
import pytest
from scipy import stats

from tlora.report import paired
from tlora.report.paired import Scores, difference, resampled_means, score, sign_flip


def outcomes(up: int, down: int, same: int) -> tuple[Scores, Scores]:
    """Return a model and the one it is compared with, by items that went up, down, or neither."""
    first = [1.0] * up + [0.0] * down + [1.0] * same
    second = [0.0] * up + [1.0] * down + [1.0] * same
    return Scores(first), Scores(second)


def test_the_limits_are_quantiles_of_the_known_distribution():
    """Where every change is up, the resampled mean is a binomial over n, known in closed form."""
    found = difference(*outcomes(up=120, down=0, same=280)).interval
    expected = stats.binom.ppf([0.025, 0.975], 400, 0.3) / 400
    # A quantile of 10,000 draws is off by two items at most, at a spread of nine.
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=2.1 / 400)


def test_the_two_ways_of_drawing_have_one_distribution(monkeypatch):
    values = np.random.default_rng(0).integers(1, 11, 200).astype(float)
    counted = resampled_means(values, np.ones(200))
    monkeypatch.setattr(paired, "_FEW", 0)
    monkeypatch.setattr(paired, "BLOCK", 200 * 999)  # blocks that do not come out even
    one_by_one = resampled_means(values, np.ones(200))
    assert len(one_by_one) == len(counted) == paired.RESAMPLES
    assert not np.array_equal(counted, one_by_one)
    assert stats.ks_2samp(counted, one_by_one).pvalue > 0.01
    spread = values.std() / 200**0.5
    assert counted.std() == pytest.approx(spread, rel=0.05)
    assert one_by_one.std() == pytest.approx(spread, rel=0.05)


def test_pairing_matters():
    """The same two sets of scores, item for item and shuffled."""
    draw = np.random.default_rng(0)
    hard = draw.normal(5, 2, 200)
    first, second = hard + 0.3 + draw.normal(0, 0.3, 200), hard + draw.normal(0, 0.3, 200)
    together = difference(Scores(list(first)), Scores(list(second)))
    shuffled = difference(Scores(list(first)), Scores(list(draw.permutation(second))))
    assert together.interval.mean == pytest.approx(shuffled.interval.mean)
    assert together.better == 1
    assert shuffled.better == 0
    width = [d.interval.high - d.interval.low for d in (together, shuffled)]
    assert width[0] < width[1] / 4


@pytest.mark.parametrize(("up", "down"), [(0, 0), (5, 5), (9, 2), (2, 9), (30, 12)])
def test_for_right_and_wrong_the_test_is_mcnemars(up, down):
    found = difference(*outcomes(up, down, 50))
    expected = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert found.p == pytest.approx(expected)


def test_for_graded_scores_it_is_the_randomization_test():
    draw = np.random.default_rng(0)
    differences = draw.normal(0.25, 1, 60)
    other = stats.permutation_test(
        (differences, np.zeros(60)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        rng=1,
    )
    assert sign_flip(differences) == pytest.approx(other.pvalue, abs=0.015)
    # All of ten differences one way: two of 1,024 flips are as extreme.
    assert sign_flip(np.arange(1.0, 11.0)) == pytest.approx(2 / 1024, abs=0.002)
    assert sign_flip(np.array([0.3, -0.3, 0.0])) == 1.0


def test_a_few_changed_items_are_no_win():
    """Five items up and none down: the interval leaves zero out, the exact test says 0.06."""
    found = difference(*outcomes(up=5, down=0, same=45))
    assert found.interval.low > 0
    assert found.p == pytest.approx(2 / 2**5)
    assert found.better == 0
    assert difference(*outcomes(up=8, down=0, same=42)).better == 1
    assert difference(*outcomes(up=0, down=8, same=42)).better == -1


def test_an_interval_that_holds_zero_is_no_win_whatever_the_test_says(monkeypatch):
    monkeypatch.setattr(paired, "sign_flip", lambda differences: 0.001)
    found = difference(*outcomes(up=6, down=5, same=40))
    assert found.interval.low < 0 < found.interval.high
    assert (found.p, found.better) == (0.001, 0)


@pytest.mark.parametrize(("share_up", "share_down"), [(0.1, 0.1), (0.2, 0.1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(share_up, share_down, monkeypatch):
    monkeypatch.setattr(paired, "RESAMPLES", 2000)
    draw = np.random.default_rng(0)
    found = []
    for _ in range(150):
        up, down, same = draw.multinomial(200, [share_up, share_down, 1 - share_up - share_down])
        found.append(difference(*outcomes(up, down, same)))
    truth = share_up - share_down
    covered = np.mean([d.interval.low <= truth <= d.interval.high for d in found])
    assert abs(covered - 0.95) < 3 * (0.05 * 0.95 / 150) ** 0.5
    wins = np.mean([d.better == 1 for d in found])
    assert (wins > 0.5) if truth else (wins <= 1 - covered)


def test_items_of_a_group_are_drawn_together():
    """Each item four times says no more than each item once."""
    draw = np.random.default_rng(0)
    values = [list(draw.integers(1, 11, 80).astype(float)) for _ in range(2)]
    groups = [str(place) for place in range(80) for _ in range(4)]
    fourfold = [[v for v in made for _ in range(4)] for made in values]
    once = difference(*map(Scores, values))
    together = difference(*(Scores(made, groups) for made in fourfold))
    alone = difference(*map(Scores, fourfold))
    for what in ("mean", "low", "high"):
        assert getattr(together.interval, what) == pytest.approx(getattr(once.interval, what))
    assert together.p == pytest.approx(once.p, abs=0.01)
    width = [d.interval.high - d.interval.low for d in (alone, together)]
    assert width[0] == pytest.approx(width[1] / 2, rel=0.1)
    own = [score(made) for made in (Scores(fourfold[0], groups), Scores(values[0]))]
    assert (own[0].low, own[0].high) == pytest.approx((own[1].low, own[1].high))


def test_scores_have_intervals_on_their_own_scale():
    right = score(Scores([1.0] * 30 + [0.0] * 70))
    known = stats.binomtest(30, 100).proportion_ci(method="wilson")
    assert (right.low, right.high) == pytest.approx((known.low, known.high))
    assert score(Scores([0.0] * 50)).low == 0
    assert score(Scores([0.0] * 50)).high == pytest.approx(1.96**2 / (50 + 1.96**2), rel=1e-3)
    assert score(Scores([1.0] * 50)).high == 1
    graded = score(Scores([4.0, 6.0, 8.0, 6.0] * 20))
    assert graded.mean == 6
    assert 5.5 < graded.low < 6 < graded.high < 6.5


def test_one_item_says_nothing():
    assert difference(Scores([1.0]), Scores([0.0])) is None
    assert score(Scores([1.0])).low is None


def test_decimal_scores_that_differ_equally_are_one_size():
    """0.3 - 0.2 and 0.2 - 0.1 are not the same number; ups and downs of both cancel to zero."""
    first, second = Scores([0.3, 0.1] * 10), Scores([0.2, 0.2] * 10)
    found = difference(first, second)
    assert found.interval.mean == 0
    assert found.p == 1.0
    assert found.interval.low < 0 < found.interval.high
