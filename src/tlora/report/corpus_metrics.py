"""Statistics of scores over all items together, such as F1 or a correlation.

As in `tlora.report.paired`, items are resampled, not models. Interval: the percentile bootstrap
(Efron 1979), resampling each item with its label and all predictions. Test: the two models'
predictions of an item exchanged at random (approximate randomization, Noreen 1989).

A statistic is a function of predictions and labels of shape (..., items), classes or values, that
returns scores of shape (...); an undefined one is 0, as in `tlora.tasks.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tlora.report.intervals import LEVEL, Difference, Interval
from tlora.report.paired import BLOCK, RESAMPLES, SEED, judged

if TYPE_CHECKING:
    import numpy as np

    Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def score(metric: str, predicted: np.ndarray, labels: np.ndarray) -> Interval:
    """Return a score and its 95 % interval; a single item has no interval.

    Args:
        metric: one of `STATISTICS`.
        predicted: a class or value per item, float64 of shape (items,).
        labels: the true ones, of the same shape.
    """
    return _interval(STATISTICS[metric], predicted, labels)


def difference(
    metric: str, first: np.ndarray, second: np.ndarray, labels: np.ndarray
) -> Difference | None:
    """Compare two models' predictions on the same items, first minus second; higher is better.

    One is better if the interval excludes zero and the test has p < 0.05. Returns None for fewer
    than two items. Arguments as in `score`.
    """
    statistic = STATISTICS[metric]

    def gap(one: np.ndarray, other: np.ndarray, true: np.ndarray) -> np.ndarray:
        return statistic(one, true) - statistic(other, true)

    if len(labels) < 2:
        return None
    return judged(
        _interval(gap, first, second, labels),
        _exchanged(lambda one, other: gap(one, other, labels), first, second),
    )


def f1(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return F1 of class 1; a prediction other than 0 or 1 counts as the wrong one of the two."""
    import numpy as np

    chosen = np.where((predicted == 0) | (predicted == 1), predicted, 1 - labels)
    hits, guesses, members = _counted(chosen, labels, 1.0)
    return _shares(2.0 * hits, guesses + members)


def f1_macro(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean F1 over all predicted or true classes."""
    total: Any = 0.0
    present: Any = 0.0
    for name in _classes(predicted, labels):
        hits, guesses, members = _counted(predicted, labels, name)
        total = total + _shares(2.0 * hits, guesses + members)
        present = present + (guesses + members > 0)
    return _shares(total, present)


def matthews(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the Matthews correlation coefficient (Gorodkin 2004 for more than two classes)."""
    import numpy as np

    right: Any = 0.0
    expected, spread, truth = right, right, right
    for name in _classes(predicted, labels):
        hits, guesses, members = _counted(predicted, labels, name)
        right, expected = right + hits, expected + guesses * members
        spread, truth = spread + guesses**2, truth + members**2
    square = float(predicted.shape[-1]) ** 2
    return _shares(
        right * predicted.shape[-1] - expected, np.sqrt((square - spread) * (square - truth))
    )


def pearson(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation."""
    import numpy as np

    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (predicted, labels))
    size = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    # The mean of equal values has a rounding error, which would appear as spread.
    constant = [(v == v[..., :1]).all(axis=-1) for v in (predicted, labels)]
    return _shares((x * y).sum(axis=-1), np.where(constant[0] | constant[1], 0.0, size))


def spearman(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation: Pearson's of the ranks, with ties sharing a rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(predicted, axis=-1), rankdata(labels, axis=-1))


STATISTICS: Mapping[str, Statistic] = {
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews_correlation": matthews,
    "pearson": pearson,
    "spearmanr": spearman,
}
"""Statistics by their names in evaluations."""


def _interval(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> Interval:
    """Return a statistic and its percentile limits, resampling items of all columns together."""
    from scipy.stats import bootstrap

    value, count = float(statistic(*columns)), len(columns[0])
    if count < 2:
        return Interval(value, None, None, count)
    found = bootstrap(
        columns,
        lambda *drawn, axis: statistic(*drawn),  # noqa: PLW0108
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BLOCK // (len(columns) * count)),
        confidence_level=LEVEL,
        method="percentile",
        rng=SEED,
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), count)


def _exchanged(gap: Callable[..., np.ndarray], first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sided p-value of "each item's predictions are exchangeable"."""
    from scipy.stats import permutation_test

    found = permutation_test(
        (first, second),
        lambda one, other, axis: gap(one, other),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BLOCK // (2 * len(first))),
        rng=SEED,
    )
    return float(found.pvalue)


def _counted(
    predicted: np.ndarray, labels: np.ndarray, name: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of true positives, predicted positives and positives of a class."""
    guesses, members = predicted == name, labels == name
    return (guesses & members).sum(-1), guesses.sum(-1), members.sum(-1)


def _classes(predicted: np.ndarray, labels: np.ndarray) -> list[float]:
    import numpy as np

    return [float(name) for name in np.union1d(predicted, labels)]


def _shares(part: Any, whole: Any) -> np.ndarray:
    """Return part / whole, or 0 if whole is 0."""
    import numpy as np

    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    shape = np.broadcast_shapes(part.shape, whole.shape)
    return np.divide(part, whole, out=np.zeros(shape), where=whole > 0)
