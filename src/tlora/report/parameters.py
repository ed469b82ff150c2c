"""Distributions of an adapter's parameters, and their norms by step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tlora.adapter.saved import PREFIX, Tensors
from tlora.adapter.savedconfig import WEIGHTS
from tlora.report.tables import plain
from tlora.training.checkpoints import MANIFEST, checkpoints_in, step_of

if TYPE_CHECKING:
    from rich.table import Table

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
Norms = dict[str, dict[str, list[tuple[int, float]]]]
"""Steps and norms by part (A, B, or a method's equivalent) and module."""


@dataclass(frozen=True)
class Entries:
    """The entries of A or of B.

    Attributes:
        norm: the Frobenius norm of the matrix.
        deviation: their standard deviation.
        excess: their excess kurtosis: 0 for a Gaussian, -1.2 for a uniform distribution, above 0
            if few entries are large. None if all are equal.
        quantiles: their quantiles at `QUANTILES`.
    """

    norm: float
    deviation: float
    excess: float | None
    quantiles: list[float]

    @classmethod
    def of(cls, matrix: Tensor) -> Entries:
        """Measure a matrix; a quantile is the nearest entry."""
        values = matrix.double().flatten().sort().values
        off = values - values.mean()
        variance = float(off.square().mean())
        excess = float(off.pow(4).mean()) / variance**2 - 3 if variance else None
        places = [round(share * (len(values) - 1)) for share in QUANTILES]
        return cls(float(values.norm()), math.sqrt(variance), excess, values[places].tolist())

    def against_gaussian(self) -> list[tuple[float, float]]:
        """Return the quantiles in standard deviations, each against a standard Gaussian's."""
        if not self.deviation:
            return []
        gaussian = map(statistics.NormalDist().inv_cdf, QUANTILES)
        return [(x, y / self.deviation) for x, y in zip(gaussian, self.quantiles, strict=True)]


def norms_by_step(checkpoints: Path) -> Norms:
    """Return the norms of the adapter's tensors at each complete checkpoint of a run.

    Args:
        checkpoints: the folder of the checkpoint-N folders; it need not exist.

    Raises:
        AdapterError: the weights of a checkpoint are damaged.
    """
    found: Norms = {}
    for folder in checkpoints_in(checkpoints):
        file = folder / WEIGHTS
        tensors = Tensors(file) if file.is_file() and (folder / MANIFEST).is_file() else {}
        for module, part, tensor in placed(tensors):
            norm = float(tensor.double().norm())
            found.setdefault(part, {}).setdefault(module, []).append((step_of(folder), norm))
    return found


def placed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield module, part and tensor of each matrix of a LoRA, from its name in the file; a part is
    A, B, or a method's equivalent."""
    for key, tensor in tensors.items():
        module, _, part = key.removeprefix(PREFIX).removesuffix(".weight").partition(".lora_")
        if part:
            yield module, part, tensor


def norms_table(norms: Norms) -> Table:
    """Return the table of norms over all modules, one line per step, followed by the range over
    modules at the last step."""
    parts = {part: [dict(line) for line in modules.values()] for part, modules in norms.items()}
    steps = sorted({step for lines in parts.values() for line in lines for step in line})
    at = {n: [[line[n] for line in own if n in line] for own in parts.values()] for n in steps}
    rows = [[f"{step}", *_cells(values, _whole)] for step, values in at.items()]
    last = at[steps[-1]]
    ends = [["least", *_cells(last, min)], ["most", *_cells(last, max)]]
    return plain(["step", *(f"norm of {part}" for part in norms)], rows, ends)


def _cells(
    values: Sequence[Sequence[float]], take: Callable[[Sequence[float]], float]
) -> list[str]:
    return [f"{take(each):.4g}" if each else "-" for each in values]


def _whole(norms: Sequence[float]) -> float:
    return math.hypot(*norms)


def curves(norms: Norms) -> Mapping[str, list[list[tuple[float, float]]]]:
    """Return the nonzero norms as lines, by part."""
    lines = {
        part: [[(float(n), norm) for n, norm in line if norm] for line in modules.values()]
        for part, modules in norms.items()
    }
    return {part: [line for line in own if line] for part, own in lines.items()}
