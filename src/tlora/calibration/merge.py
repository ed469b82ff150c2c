"""Calibrations of different samples of one model -> the calibration of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tlora.calibration.cache import Key
from tlora.calibration.statistics import Calibration, ModuleStatistics
from tlora.errors import CalibrationError
from tlora.linalg.moments import SecondMoment, merged


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
                moments[group] = merged([m.kept_moment() for m in each])
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
    total = each[0].samples * each[0].kept_gradient()
    for module in each[1:]:
        total.add_(module.kept_gradient().to(total.device), alpha=module.samples)
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
