"""Rendering of all pages: one HTML file without external scripts, styles or fonts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tlora.report import numbers


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render ``template``, a file in templates/, with ``context``."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tlora.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in ("number", "signed", "count", "margin"):
        environment.filters[name] = getattr(numbers, name)
    environment.filters["svg"] = markupsafe.Markup  # drawn or encoded here, not by a user
    return environment.get_template(template).render(context)


def embedded(value: Any) -> str:
    """Encode plain JSON values as text for a script element of the page."""
    # A "<" could end the script element.
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def listed(values: Sequence[Any]) -> str:
    """Return the distinct ``values``, most frequent first."""
    known = Counter(str(value) for value in values if value not in (None, ""))
    return "; ".join(value for value, _ in known.most_common())


def machines(provenances: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, str]]:
    """Return (name, values) for versions and hardware, listing differences between runs.

    Args:
        provenances: one per run, from `tlora.training.runfolder.provenance`.
    """
    found = [_machine(each or {}) for each in provenances]
    return [(name, listed([row[name] for row in found]) or numbers.NONE) for name in _machine({})]


def _machine(provenance: Mapping[str, Any]) -> dict[str, Any]:
    packages, git = provenance.get("packages") or {}, provenance.get("git")
    hardware = provenance.get("hardware") or {}
    changed = " with uncommitted changes" if git and git["dirty"] else ""
    return {
        "Packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "Python": provenance.get("python"),
        "Commit": git and git["commit"][:12] + changed,
        "Processor": hardware.get("cpu"),
        "Cores": hardware.get("cores"),
        "GPU": ", ".join(hardware.get("gpus") or ["none"]),
    }
