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
    """F1 of class 1 ("binary") or the mean F1 of all classes ("macro")."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average=average, zero_division=0))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two sets of classes, -1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def correlations(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation of two sets of numbers."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        values = {
            "pearson": float(stats.pearsonr(predicted, labels).statistic),
            "spearmanr": float(stats.spearmanr(predicted, labels).statistic),
        }
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
