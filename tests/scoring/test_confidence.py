"""Calibration is what its definition says, on a case by hand."""

import numpy as np
import pytest

from tlora.scoring.confidence import calibration_error, log_probabilities


def test_the_calibration_error_by_hand():
    confidence = np.array([0.55, 0.65, 0.6, 1.0, 0.95])
    right = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    # Of five bins (0.4, 0.6] has the first and third, (0.6, 0.8] the second, (0.8, 1] the last two.
    wanted = (2 * abs(1 - 0.575) + abs(0 - 0.65) + 2 * abs(0.5 - 0.975)) / 5
    assert calibration_error(confidence, right, bins=5) == pytest.approx(wanted)


def test_who_is_right_as_often_as_confident_has_no_error():
    confidence = np.full(10, 0.7)
    assert calibration_error(confidence, np.arange(10) < 7) == pytest.approx(0)
    assert calibration_error(confidence, np.zeros(10)) == pytest.approx(0.7)


def test_logits_without_end_stay_finite():
    found = log_probabilities(np.array([[1000.0, 0.0], [0.0, 0.0]], dtype=np.float32))
    assert found == pytest.approx(np.array([[0.0, -1000.0], [-np.log(2)] * 2]))
