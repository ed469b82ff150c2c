"""Versions and hardware of the runs behind a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tlora.report.numbers import NONE


def rows(provenances: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, str]]:
    """Return (what, which) for a page; what differs is listed, most frequent first.

    Args:
        provenances: one a run, as `tlora.training.runfolder.provenance` makes them.
    """
    found = [_row(each or {}) for each in provenances]
    missing = {"GPU": "none"}
    return [
        (name, listed([row[name] for row in found]) or missing.get(name, NONE)) for name in _row({})
    ]


def listed(values: Sequence[Any]) -> str:
    """Return the distinct ``values`` that are there, most frequent first."""
    known = Counter(str(value) for value in values if value not in (None, ""))
    return "; ".join(value for value, _ in known.most_common())


def _row(provenance: Mapping[str, Any]) -> dict[str, Any]:
    packages, git = provenance.get("packages") or {}, provenance.get("git")
    hardware = provenance.get("hardware") or {}
    changed = " with uncommitted changes" if git and git["dirty"] else ""
    return {
        "Packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "Python": provenance.get("python"),
        "Commit": git and git["commit"][:12] + changed,
        "Processor": hardware.get("cpu"),
        "Cores": hardware.get("cores"),
        "GPU": ", ".join(hardware.get("gpus") or []),
    }
