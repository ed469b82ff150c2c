"""Scores of predictions against labels, each a plain float.

A correlation or a coefficient that is undefined, because the predictions or the labels are all
the same, counts as 0: such a model has found no relation.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of the rows whose predicted class is the label."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray, average: str = "binary") -> float:
    """F1 of class 1 ("binary") or the mean F1 of all classes ("macro").

    "binary": a prediction that is neither 0 nor 1, because a reply was no label, counts as the
    wrong one of the two, as in T5's own evaluation.
    """
    import numpy as np
    from sklearn.metrics import f1_score

    if average == "binary":
        predicted = np.where((predicted == 0) | (predicted == 1), predicted, 1 - labels)
    return float(f1_score(labels, predicted, average=average, zero_division=0))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two sets of classes, -1 to 1; -1 among them is one class more."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(matthews_corrcoef(labels, predicted))


def correlations(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation of two sets of numbers."""
    from scipy import stats

    if len(labels) < 2:
        return {"pearson": 0.0, "spearmanr": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        values = {
            "pearson": float(stats.pearsonr(predicted, labels).statistic),
            "spearmanr": float(stats.spearmanr(predicted, labels).statistic),
        }
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
