"""Versions and hardware of the runs behind a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tlora.report.numbers import NONE


def rows(provenances: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, str]]:
    """Return (what, which) for a page; what differs is listed, most frequent first.

    Args:
        provenances: one a run, as `tlora.runfolder.provenance` makes them.
    """
    found: dict[str, list[Any]] = {
        "Packages": [_packages((p or {}).get("packages")) for p in provenances],
        "Python": [(p or {}).get("python") for p in provenances],
        "Commit": [_commit((p or {}).get("git")) for p in provenances],
        "Processor": [_hardware(p, "cpu") for p in provenances],
        "Cores": [_hardware(p, "cores") for p in provenances],
        "GPU": [", ".join(_hardware(p, "gpus") or []) for p in provenances],
    }
    missing = {"GPU": "none"}
    return [(what, listed(values) or missing.get(what, NONE)) for what, values in found.items()]


def listed(values: Sequence[Any]) -> str:
    """Return the distinct ``values`` that are there, most frequent first."""
    known = Counter(str(value) for value in values if value not in (None, ""))
    return "; ".join(value for value, _ in known.most_common())


def _packages(versions: Mapping[str, str | None] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items() if version)


def _commit(state: Mapping[str, Any] | None) -> str:
    if not state:
        return ""
    return state["commit"][:12] + (" with uncommitted changes" if state["dirty"] else "")


def _hardware(provenance: Mapping[str, Any] | None, what: str) -> Any:
    return ((provenance or {}).get("hardware") or {}).get(what)
