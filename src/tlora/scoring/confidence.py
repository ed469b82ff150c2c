"""Calibration of a model's probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BINS = 15


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return log softmax over the last axis, in float64."""
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error: sum_b (n_b / n) |accuracy_b - mean confidence_b|.

    Args:
        confidence: probability of the chosen class of each item; bins have equal width and include
            their upper end.
        right: whether each choice is right.
        bins: number of bins.

    Source: Guo et al., arXiv 1706.04599, section 2, with 15 bins.
    """
    import numpy as np

    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
