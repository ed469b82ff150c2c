"""What calibration leaves behind: per module a sensitivity and the second moment of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlora.calibration.bank import moment_parts
from tlora.calibration.identity import Key
from tlora.errors import CalibrationError
from tlora.files import file_at, read_tensors, write_tensors
from tlora.linalg.moments import SecondMoment
from tlora.linalg.product import Product

_KIND = "calibration"
_FORMAT = 3
_FILE = "calibration.safetensors"


def calibration_file(path: str | Path) -> Path:
    """Return the file that ``path`` means: itself, or the usual one in an existing folder."""
    return file_at(path, _FILE)


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
    """

    name: str
    d_in: int
    d_out: int
    samples: int
    sensitivity: float | None
    moment: SecondMoment | None = None
    moment_id: int = -1

    @property
    def tokens(self) -> int:
        """Real tokens that the module saw; 0 where no moment was kept."""
        return 0 if self.moment is None else self.moment.tokens

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

    def covariance(self) -> Tensor:
        """Return C = (1/n) sum_s (X_s - mean X_s)^T (X_s - mean X_s), d x d float32.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self._kept_moment().covariance().float()

    def uncentred(self) -> Tensor:
        """Return C0 = (1/n) sum_s X_s^T X_s, d x d float32.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self._kept_moment().uncentred().float()

    def weighted(self, weight: Tensor) -> Product:
        """Return W C for the module's weight W (m x d), in factors where C was never formed.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self._kept_moment().weighted(weight)

    def _kept_moment(self) -> SecondMoment:
        if self.moment is None:
            raise CalibrationError(
                f"{self.name}: no second moment was kept, because the configuration calibrated"
                ' for needs none (basis="random"); calibrate again with basis="weight-covariance".'
            )
        return self.moment


@dataclass
class Calibration:
    """Statistics of all targeted modules, keyed by the module's full name, in model order."""

    modules: dict[str, ModuleStatistics]
    samples: int
    info: dict[str, Any] = field(default_factory=dict)
    """Where the statistics come from: model class, configuration. Plain JSON values."""
    key: Key | None = None
    """What they are of, to the bit; None: not known (put together by hand)."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __add__(self, other: Calibration) -> Calibration:
        """Return the statistics over the samples of both; see `tlora.calibration.merge.merge`."""
        from tlora.calibration.merge import merge

        return merge([self, other]) if isinstance(other, Calibration) else NotImplemented

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (tensors, and a JSON header), atomically; return its path.

        Args:
            path: the file, or an existing folder that gets ``calibration.safetensors``.
        """
        path = calibration_file(path)
        tensors = {}
        rows = []
        for module in self.modules.values():
            rows.append(
                {
                    "name": module.name,
                    "d_in": module.d_in,
                    "d_out": module.d_out,
                    "sensitivity": module.sensitivity,
                    "moment": module.moment_id,
                }
            )
        counts = {}
        for key, moment in self._moments().items():
            for part, tensor in moment.parts().items():
                tensors[f"{key}.{part}"] = tensor
            counts[str(key)] = {"samples": moment.samples, "tokens": moment.tokens}
        # safetensors stores float32 exactly and JSON's repr of a double round-trips, so what is
        # loaded is what was saved, to the bit.
        header = {"kind": _KIND, "format": _FORMAT, "samples": self.samples, "info": self.info}
        header |= {"key": self.key and self.key.to_dict(), "modules": rows, "moments": counts}
        write_tensors(path, tensors, header)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. Second moments are mapped, and read when they are looked at.

        Raises:
            ArtifactError: the file is missing, damaged or something else.
        """
        tensors, header = read_tensors(calibration_file(path), _KIND)
        moments = {
            int(key): SecondMoment.from_parts(moment_parts(tensors, key), **counts)
            for key, counts in header["moments"].items()
        }
        modules = {
            row["name"]: ModuleStatistics(
                name=row["name"],
                d_in=row["d_in"],
                d_out=row["d_out"],
                samples=header["samples"],
                sensitivity=row["sensitivity"],
                moment=moments.get(row["moment"]),
                moment_id=row["moment"],
            )
            for row in header["modules"]
        }
        key = header.get("key")
        return cls(modules, header["samples"], header["info"], key and Key(**key))

    def to(self, device: torch.device | str) -> Calibration:
        """Move the second moments to ``device`` in place; return self."""
        for moment in self._moments().values():
            moment.move(device)
        return self

    def _moments(self) -> dict[int, SecondMoment]:
        return {m.moment_id: m.moment for m in self.modules.values() if m.moment is not None}
