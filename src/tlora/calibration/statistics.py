"""What calibration leaves behind: per module a sensitivity and the second moment of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlora.calibration.bank import moment_parts
from tlora.calibration.cache import Key
from tlora.config import SensitivityRule, TLoraConfig
from tlora.errors import CalibrationError
from tlora.files import file_at, read_tensors, write_tensors
from tlora.linalg.moments import SecondMoment
from tlora.linalg.product import Product

_KIND = "calibration"
_FORMAT = 4
_FILE = "calibration.safetensors"
# What a module's statistics may hold, by the property of `TLoraConfig` that asks for it.
_ASKED_BY = {
    "sensitivity": "needs_sensitivity",
    "moment": "needs_moments",
    "fisher": "needs_fisher",
    "gradient": "needs_gradient",
    "gradient_moment": "needs_gradient_moment",
}


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
        return self.kept_moment().covariance().float()

    def uncentred(self) -> Tensor:
        """Return C0 = (1/n) sum_s X_s^T X_s, d x d float32.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self.kept_moment().uncentred().float()

    def weighted(self, weight: Tensor) -> Product:
        """Return W C for the module's weight W (m x d), in factors where C was never formed.

        Raises:
            CalibrationError: the calibration kept no second moments.
        """
        return self.kept_moment().weighted(weight)

    def kept_gradient(self) -> Tensor:
        """Return G.

        Raises:
            CalibrationError: the calibration kept no gradients.
        """
        if self.gradient is None:
            raise CalibrationError(self._lacks("mean gradient", "gradient"))
        return self.gradient

    def kept_gradient_moment(self) -> SecondMoment:
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

    def kept_moment(self) -> SecondMoment:
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

    def lacks(self, names: Sequence[str], config: TLoraConfig) -> list[str]:
        """Say what planning the modules ``names`` by ``config`` needs and this does not hold.

        What concerns planning alone (rank, budget, scales, seed) plays no part, and more than is
        needed will do.
        """
        needed = {kind for kind, asks in _ASKED_BY.items() if getattr(config, asks)}
        held = set(_ASKED_BY)
        for module in self.modules.values():
            held &= {kind for kind in held if getattr(module, kind) is not None}
        faults = [] if list(names) == list(self.modules) else ["other modules"]
        if needed - held:
            faults.append("it lacks statistics that are needed")
        return faults

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
                | ({} if module.fisher is None else {"fisher": module.fisher})
            )
            if module.gradient is not None:
                tensors[_gradient_key(module.name)] = module.gradient
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
        tensors, header = read_tensors(calibration_file(path), _KIND, _FORMAT)
        moments = {
            key: SecondMoment.from_parts(moment_parts(tensors, key), **counts)
            for key, counts in header["moments"].items()
        }
        modules = {
            row["name"]: ModuleStatistics(
                name=row["name"],
                d_in=row["d_in"],
                d_out=row["d_out"],
                samples=header["samples"],
                sensitivity=row["sensitivity"],
                moment=moments.get(str(row["moment"])),
                moment_id=row["moment"],
                fisher=row.get("fisher"),
                gradient=tensors.get(_gradient_key(row["name"])),
                gradient_moment=moments.get(_moment_key(row["name"])),
            )
            for row in header["modules"]
        }
        key = header.get("key")
        return cls(modules, header["samples"], header["info"], key and Key.from_dict(key))

    def to(self, device: torch.device | str) -> Calibration:
        """Move second moments and gradients to ``device`` in place; return self."""
        for moment in self._moments().values():
            moment.move(device)
        for module in self.modules.values():
            module.gradient = None if module.gradient is None else module.gradient.to(device)
        return self

    def _moments(self) -> dict[str, SecondMoment]:
        """Return every second moment once, by the name it has in a file."""
        each = self.modules.values()
        shared = {str(m.moment_id): m.moment for m in each if m.moment is not None}
        own = {
            _moment_key(m.name): m.gradient_moment for m in each if m.gradient_moment is not None
        }
        return shared | own


def _gradient_key(name: str) -> str:
    """Return what a file calls a module's mean gradient ("/" is in no module's name)."""
    return f"gradient/{name}"


def _moment_key(name: str) -> str:
    """Return what a file calls a module's gradient-weighted moment; its parts follow a dot."""
    return f"gradient-moment/{name}/"
