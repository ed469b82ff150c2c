"""What calibration leaves behind: the statistics of all modules, in a file and merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlora.calibration.cache import Key
from tlora.calibration.module_statistics import ModuleStatistics
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError
from tlora.files import file_at, read_tensors, write_tensors
from tlora.linalg.moments import SecondMoment, merged

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
        """Return the statistics over the samples of both; see `merge`."""

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


def merge(parts: Sequence[Calibration]) -> Calibration:
    """Return what one calibration over the samples of all ``parts``, in this order, gives.

    S = sum_p n_p S_p / sum_p n_p, likewise C and the rest, equal up to rounding. Modules
    that share a second moment in every part share one in the result. The parts stay as they are;
    the result's second moments are in memory, on the first part's devices.

    Args:
        parts: one or more, of different samples; of the same model, modules and statistics.

    Raises:
        CalibrationError: they are not, or there are none.
    """
    if not parts:
        raise CalibrationError("there are no calibrations to merge; give one or more.")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=1):
        if fault := _fault(first, part):
            raise CalibrationError(f"calibration {number} does not merge with the first: {fault}")
    samples = sum(part.samples for part in parts)
    # The common refinement of who shares: modules are together where every part has them so.
    numbers: dict[tuple[int, ...], int] = {}
    moments: dict[int, SecondMoment] = {}
    modules = {}
    for name, module in first.modules.items():
        each = [part.modules[name] for part in parts]
        group = -1
        if module.moment is not None:
            group = numbers.setdefault(tuple(m.moment_id for m in each), len(numbers))
            if group not in moments:
                moments[group] = merged([m.require_moment() for m in each])
        modules[name] = ModuleStatistics(
            name=name,
            d_in=module.d_in,
            d_out=module.d_out,
            samples=samples,
            sensitivity=_mean(each, "sensitivity"),
            moment=moments.get(group),
            moment_id=group,
            fisher=_mean(each, "fisher"),
            gradient=_mean_gradient(each),
            gradient_moment=_merged([m.gradient_moment for m in each]),
        )
    return Calibration(modules, samples, _info(parts), _key(parts))


def _mean(each: Sequence[ModuleStatistics], name: str) -> float | None:
    values = [(m.samples, getattr(m, name)) for m in each]
    known = [(n, value) for n, value in values if value is not None]
    samples = sum(n for n, _ in known)
    return sum(n * value for n, value in known) / samples if known else None


def _mean_gradient(each: Sequence[ModuleStatistics]) -> Tensor | None:
    if any(m.gradient is None for m in each):
        return None
    total = each[0].samples * each[0].require_gradient()
    for module in each[1:]:
        total.add_(module.require_gradient().to(total.device), alpha=module.samples)
    return total.div_(sum(m.samples for m in each))


def _merged(moments: Sequence[SecondMoment | None]) -> SecondMoment | None:
    known = [moment for moment in moments if moment is not None]
    return merged(known) if known else None


def _fault(first: Calibration, other: Calibration) -> str | None:
    """Return why two calibrations are not of the same model and statistics, or None."""
    if first.key and other.key and first.key.model != other.key.model:
        kinds = [part.info.get("model", "unknown class") for part in (first, other)]
        return (
            f"they are of different models ({kinds[0]} and {kinds[1]}, other parameters); merge"
            " calibrations of one model."
        )
    alike = list(first.modules) == list(other.modules) and all(
        (a.d_in, a.d_out) == (b.d_in, b.d_out) and _holds(a) == _holds(b)
        for a, b in zip(first.modules.values(), other.modules.values(), strict=True)
    )
    if alike:
        return None
    return (
        f"they were made with different configurations ({len(first)} and {len(other)} modules);"
        " merge calibrations of the same modules that hold the same statistics."
    )


def _holds(module: ModuleStatistics) -> list[bool]:
    names = ("moment", "sensitivity", "fisher", "gradient", "gradient_moment")
    return [getattr(module, name) is not None for name in names]


def _key(parts: Sequence[Calibration]) -> Key | None:
    keys = [part.key for part in parts if part.key is not None]
    if len(keys) < len(parts):
        return None
    return Key(keys[0].model, tuple(digest for key in keys for digest in key.data))


def _info(parts: Sequence[Calibration]) -> dict[str, Any]:
    """Return the first part's origin; samples left out are counted on through the parts."""
    skipped: dict[str, str] = {}
    given = 0
    for part in parts:
        left_out = part.info.get("skipped_samples", {})
        skipped |= {str(given + int(number)): reason for number, reason in left_out.items()}
        given += part.samples + len(left_out)
    return parts[0].info | {"skipped": len(skipped), "skipped_samples": skipped}


def _gradient_key(name: str) -> str:
    """Return what a file calls a module's mean gradient ("/" is in no module's name)."""
    return f"gradient/{name}"


def _moment_key(name: str) -> str:
    """Return what a file calls a module's gradient-weighted moment; its parts follow a dot."""
    return f"gradient-moment/{name}/"


def moment_parts(tensors: Mapping[str, Tensor], group: int | str) -> dict[str, Tensor]:
    """Return the parts of a second moment from tensors that are named "GROUP.PART"."""
    prefix = f"{group}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
