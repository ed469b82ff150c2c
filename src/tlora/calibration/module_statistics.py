"""What calibration leaves behind of one module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tlora.config import SensitivityRule
from tlora.errors import CalibrationError
from tlora.linalg.matrices import FactoredMatrix
from tlora.linalg.moments import SecondMoment


@dataclass
class ModuleStatistics:
    """Statistics of one module over the calibration samples.

    Attributes:
        name: the module's full name in the base model.
        d_in: d, input columns of the weight.
        d_out: m, rows of the weight.
        samples: n, calibration samples.
        sensitivity: S = (1/n) sum_s mean_jk |W_jk (dL_s/dW)_jk|, or None if no backward was run.
        moment: second moment of the inputs, shared with the modules that read the same tensor;
            None if the configuration needs none.
        moment_id: equal for modules that share ``moment``.
        fisher: (1/n) sum_s mean_jk (dL_s/dW)_jk^2, where the configuration asks for it.
        gradient: G = (1/n) sum_s dL_s/dW, m x d float32, where the configuration asks for it.
        gradient_moment: N = (1/n) sum_s sum_t ||delta_t||^2 x_t x_t^T with delta_t the gradient of
            L_s at the module's output and x_t its input, where the configuration asks for it.
    """

    name: str
    d_in: int
    d_out: int
    samples: int
    sensitivity: float | None
    moment: SecondMoment | None = None
    moment_id: int = -1
    fisher: float | None = None
    gradient: Tensor | None = None
    gradient_moment: SecondMoment | None = None

    @property
    def tokens(self) -> int:
        """Real tokens that the module saw; 0 where no moment was kept."""
        return 0 if self.moment is None else self.moment.tokens

    def measured(self, rule: SensitivityRule) -> float | None:
        """Return what ranks and scales are shared out by; None if it was not measured."""
        return self.sensitivity if rule == "magnitude" else self.fisher

    @property
    def required_sensitivity(self) -> float:
        """`sensitivity`, where something is shared out by it.

        Raises:
            CalibrationError: none was measured.
        """
        if self.sensitivity is None:
            raise CalibrationError(
                f"{self.name}: no sensitivity was measured, because the configuration calibrated"
                " for allocates neither ranks nor scales; calibrate again with allocate_rank or"
                " allocate_scale on."
            )
        return self.sensitivity

    def sensitivity_by(self, rule: SensitivityRule) -> float:
        """Return what ranks and scales are shared out by.

        Raises:
            CalibrationError: it was not measured.
        """
        if rule == "magnitude":
            return self.required_sensitivity
        if self.fisher is None:
            raise CalibrationError(
                f"{self.name}: no squared gradient was measured, because the configuration"
                " calibrated for does not allocate by it; calibrate again with sensitivity_rule"
                '="fisher".'
            )
        return self.fisher

    def covariance(self) -> Tensor:
        """Return C = (1/n) sum_s (X_s - mean X_s)^T (X_s - mean X_s), d x d float32.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self.require_moment().covariance().float()

    def uncentered(self) -> Tensor:
        """Return C0 = (1/n) sum_s X_s^T X_s, d x d float32.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self.require_moment().uncentered().float()

    def weighted(self, weight: Tensor) -> FactoredMatrix:
        """Return W C for the module's weight W (m x d), in factors where C was never formed.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self.require_moment().weighted(weight)

    def require_gradient(self) -> Tensor:
        """Return G.

        Raises:
            CalibrationError: the calibration kept no gradients.
        """
        if self.gradient is None:
            raise CalibrationError(self._lacks("mean gradient", "gradient"))
        return self.gradient

    def require_gradient_moment(self) -> SecondMoment:
        """Return N.

        Raises:
            CalibrationError: the calibration kept none.
        """
        if self.gradient_moment is None:
            raise CalibrationError(
                self._lacks("gradient-weighted second moment", "gradient-moment")
            )
        return self.gradient_moment

    def _lacks(self, what: str, basis: str) -> str:
        return (
            f"{self.name}: no {what} was kept, because the `basis` calibrated for needs none;"
            f' calibrate again with the `basis` that is planned for, or basis="{basis}".'
        )

    def require_moment(self) -> SecondMoment:
        """Return the second moment of the inputs.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        if self.moment is None:
            raise CalibrationError(
                f"{self.name}: no second moment was kept, because the configuration calibrated"
                ' for needs none (basis="random"); calibrate again with basis="weight-covariance".'
            )
        return self.moment
