"""Scores of all items together: as scikit-learn and scipy give them, with intervals that hold."""

import json

import numpy as np
import pytest
from scipy import stats
from tests.report import evaluations

from tlora.report import corpus_metrics, evaluation, outcomes, read_evaluation
from tlora.tasks import metrics

DRAW = np.random.default_rng
OWN = {
    "f1": metrics.f1,
    "f1_macro": lambda predicted, labels: metrics.f1(predicted, labels, average="macro"),
    "matthews_correlation": metrics.matthews,
    "pearson": lambda predicted, labels: metrics.correlations(predicted, labels)["pearson"],
    "spearmanr": lambda predicted, labels: metrics.correlations(predicted, labels)["spearmanr"],
}


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(corpus_metrics, "RESAMPLES", 1000)


def test_every_statistic_has_the_score_of_a_task_beside_it():
    assert OWN.keys() == corpus_metrics.STATISTICS.keys()


@pytest.mark.parametrize("metric", OWN)
@pytest.mark.parametrize("count", [2, 7, 60])
def test_a_statistic_of_many_draws_is_the_tasks_score_of_each(metric, count):
    """Ties, classes that a draw lacks, predictions that are no label and constant ones included."""
    draw = DRAW(count)
    classes = 2 if metric == "f1" else 4
    predicted = draw.integers(-1, classes, (40, count)).astype(float)
    labels = draw.integers(0, classes, (40, count)).astype(float)
    predicted[0], labels[1], predicted[2] = 1.0, 1.0, labels[2]
    # Ten times 0.1, say, has a mean that is not quite 0.1.
    predicted[3] = labels[3] = 0.1 if metric in ("pearson", "spearmanr") else 0.0
    found = corpus_metrics.STATISTICS[metric](predicted, labels)
    assert found.shape == (40,)
    expected = [OWN[metric](*pair) for pair in zip(predicted, labels, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_interval_of_a_correlation_is_fishers_with_many_items():
    draw = DRAW(0)
    labels = draw.normal(size=2000)
    predicted = labels + draw.normal(size=2000)
    found = corpus_metrics.score("pearson", predicted, labels)
    ends = stats.pearsonr(predicted, labels).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.004)
    assert found.mean == pytest.approx(stats.pearsonr(predicted, labels).statistic)


def test_intervals_of_a_difference_hold_the_truth_as_often_as_they_say():
    """Two equal models: F1's true difference is 0, in the interval in about 95 of 100 cases."""
    held = wins = 0
    for trial in range(120):
        draw = DRAW(trial)
        labels = draw.integers(0, 2, 150).astype(float)
        one, other = (np.where(draw.random(150) < 0.2, 1 - labels, labels) for _ in range(2))
        found = corpus_metrics.difference("f1", one, other, labels)
        held += found.interval.low <= 0 <= found.interval.high
        wins += bool(found.better)
    # Two standard errors of 120 cases are 4 %.
    assert 0.90 <= held / 120 <= 0.99
    assert wins / 120 <= 0.09


def test_the_test_of_few_items_is_exact():
    """Six items: the share of the 64 exchanges that are as far apart, counted one by one."""
    draw = DRAW(3)
    labels = draw.normal(size=6)
    one, other = labels + draw.normal(size=6) * 0.3, draw.normal(size=6)
    seen = abs(corpus_metrics.pearson(one, labels) - corpus_metrics.pearson(other, labels))
    beyond = 0
    for code in range(64):
        swap = np.array([code >> bit & 1 for bit in range(6)], dtype=bool)
        first, second = np.where(swap, other, one), np.where(swap, one, other)
        gap = corpus_metrics.pearson(first, labels) - corpus_metrics.pearson(second, labels)
        beyond += abs(gap) >= seen - 1e-12
    found = corpus_metrics.difference("pearson", one, other, labels)
    assert found.p == pytest.approx(beyond / 64)


def test_a_clear_difference_is_called_one_and_none_is_a_tie():
    draw = DRAW(5)
    labels = draw.normal(size=200)
    good, bad = labels + 0.3 * draw.normal(size=200), labels + 3 * draw.normal(size=200)
    found = corpus_metrics.difference("spearmanr", good, bad, labels)
    assert (found.better, found.interval.count) == (1, 200)
    assert found.p < 0.005
    assert corpus_metrics.difference("spearmanr", bad, good, labels).better == -1
    same = corpus_metrics.difference("spearmanr", good, good, labels)
    assert (same.interval.mean, same.interval.low, same.interval.high) == (0.0, 0.0, 0.0)
    assert (same.better, same.p) == (0, 1.0)
    assert corpus_metrics.difference("spearmanr", good[:1], bad[:1], labels[:1]) is None
    assert corpus_metrics.score("spearmanr", good[:1], labels[:1]).low is None


def values(noise, count=150, **fields):
    """Return the samples of a regression whose predictions are so far off."""
    draw = DRAW(9)
    labels, off = draw.uniform(0, 5, count), DRAW(int(noise * 10)).normal(size=count)
    return [
        {
            "item": str(place),
            "prompt": f"pair {place}",
            "reply": f"{label + noise * away:.6g}",
            "answer": f"{label + noise * away:.6g}",
            "target": f"{label:g}",
            "scores": {},
            "predicted": label + noise * away,
            "label": label,
        }
        | fields
        for place, (label, away) in enumerate(zip(labels, off, strict=True))
    ]


@pytest.fixture
def folder(tmp_path):
    """A regression as `tlora eval` leaves it: a base, and an adapter that is nearer the labels."""
    made = {"base": values(3.0), "adapter": values(0.5)}
    path = evaluations.write(tmp_path / "out", {"stsb": made})
    (task,) = json.loads((path / "eval.json").read_text())["tasks"]
    task |= {"metrics": ["pearson", "spearmanr"], "scores": {}}
    for model, lines in made.items():
        pair = [np.array([line[name] for line in lines]) for name in ("predicted", "label")]
        task["scores"][model] = metrics.correlations(*pair)
    evaluations.change(path, tasks=[task])
    return path


def test_the_report_compares_models_by_a_correlation(folder):
    results = outcomes.gather(read_evaluation.read(folder))
    row = results.rows[0]
    assert (row.metric, row.by_item, row.together, row.main) == ("pearson", False, True, True)
    base, adapter = row.cells
    assert base.difference is None
    assert base.score.low < base.score.mean < base.score.high < adapter.score.low
    assert adapter.difference.better == 1
    assert adapter.difference.interval.mean == pytest.approx(adapter.score.mean - base.score.mean)
    assert results.tested == 1
    text = evaluation.write(folder).text
    assert "no interval" not in text
    assert "By pearson, adapter is better than base on stsb." in text


def test_a_score_that_its_predictions_do_not_make_is_not_compared(folder):
    (task,) = json.loads((folder / "eval.json").read_text())["tasks"]
    task["scores"]["adapter"]["pearson"] -= 0.01
    evaluations.change(folder, tasks=[task])
    first, second = outcomes.gather(read_evaluation.read(folder)).rows
    assert (first.together, second.together) == (False, True)
    assert [cell.difference for cell in first.cells] == [None, None]
    assert first.cells[1].score.low is None
