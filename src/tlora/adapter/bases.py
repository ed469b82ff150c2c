"""Which matrix a basis is made from: its leading right singular vectors are the rows of A.

A basis is one line here, one in `tlora.config` (its name, and the statistics that it needs).
Source: docs/method.md, 3 and 9.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tlora.calibration.statistics import ModuleStatistics
from tlora.config import Basis
from tlora.linalg.bases import half_weighted, moment_itself
from tlora.linalg.product import Product

Matrix = Callable[[Tensor, ModuleStatistics], Product]
"""Takes W (m x d float32) and the module's statistics; gives a matrix of d columns on W's device.

Raises:
    CalibrationError: the calibration lacks what it is made from.
"""

MATRICES: dict[Basis, Matrix] = {
    "weight-covariance": lambda w, s: s.weighted(w),
    "covariance": lambda w, s: moment_itself(s.kept_moment(), w),
    "weight-half-covariance": lambda w, s: half_weighted(w, s.kept_moment()),
    "gradient": lambda w, s: Product(s.kept_gradient().to(w)),
    "gradient-covariance": lambda w, s: s.weighted(s.kept_gradient().to(w)),
    "gradient-moment": lambda w, s: moment_itself(s.kept_gradient_moment(), w),
    "weight-gradient-moment": lambda w, s: s.kept_gradient_moment().weighted(w),
}
"""By basis; one that is not here needs no matrix (random)."""
