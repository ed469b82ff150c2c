"""W C of a module whose input no other module shares, computed from the module's outputs.

With Y_s = X_s W^T + b, centering removes b: W C = (1/n) sum_s (Y_s - mean)^T (X_s - mean). This
costs m d products per token; C costs d^2 / 2, and W C then m d^2 more. So it saves work and memory
wherever m <= d / 2 (down projections). C itself is not computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tlora.linalg.matrices import FactoredMatrix, full_precision
from tlora.linalg.moments import centered_rows


class CrossMoment:
    """n W C, accumulated batch by batch from inputs and float32 outputs.

    Args:
        rows: m.
        columns: d.
        device: where to accumulate.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str | None = None) -> None:
        self.total = torch.zeros(rows, columns, device=device)
        self.samples = 0
        self.tokens = 0

    @property
    def device(self) -> torch.device:
        """Device of the accumulator."""
        return self.total.device

    @full_precision
    def update(
        self,
        inputs: Tensor,
        outputs: Tensor,
        mask: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        """Add a batch of samples.

        Args:
            inputs: B x T x d float32, the module's input.
            outputs: B x T x m float32, its output.
            mask: B x T, true at real tokens; None: every token is real.
            places: positions of the real tokens among the B T rows, if known.
        """
        x = centered_rows(inputs, mask, torch.float32, places)
        y = centered_rows(outputs, mask, torch.float32, places)
        self.total.addmm_(y.centered.T, x.centered)
        self.samples += len(inputs)
        self.tokens += x.tokens

    def weighted(self, weight: Tensor) -> FactoredMatrix:
        """Return W C, float32, on the device of ``weight``."""
        return FactoredMatrix(self.total.to(weight.device) / max(self.samples, 1))
