"""Metrics of predictions against labels, each a plain float.

A correlation or coefficient that is undefined because all predictions or all labels are equal
counts as 0: the model has found no relation.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of rows whose predicted class equals the label."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray, average: str = "binary") -> float:
    """Return F1 of class 1 ("binary") or the mean F1 of all classes ("macro").

    "binary": a prediction other than 0 or 1 (a reply that is not a label) counts as the wrong one
    of the two, as in T5's own evaluation.
    """
    import numpy as np
    from sklearn.metrics import f1_score

    if average == "binary":
        predicted = np.where((predicted == 0) | (predicted == 1), predicted, 1 - labels)
    return float(f1_score(labels, predicted, average=average, zero_division=0))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the Matthews correlation, -1 to 1; a prediction of -1 is an extra class."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(matthews_corrcoef(labels, predicted))


def correlations(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation."""
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
