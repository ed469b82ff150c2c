"""What every page shares: one HTML file that needs no script, style or font from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tlora.report import numbers


def render(template: str, context: Mapping[str, Any]) -> str:
    """Return the page of ``template``, a file in templates/, which shows ``context``."""
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
    """Return ``value``, of plain JSON values, as text for a script element of the page."""
    # A "<" could end the script element that holds the text.
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
