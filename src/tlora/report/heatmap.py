"""Heat maps of layers x projections, and the page of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tlora.files import replacing_file
from tlora.report import html

if TYPE_CHECKING:
    from tlora.adapter.plan import AdapterPlan

_FIELDS = {"rank": "{}", "scale": "{:.2f}", "sensitivity": "{:.1e}", "captured_energy": "{:.2f}"}
Module = TypeVar("Module")

OUTSIDE = "-"
"""The row for modules outside numbered layers, such as a head."""


def save(plan: AdapterPlan, path: Path) -> Path:
    """Write the page of ``plan``, atomically; return its path."""
    measured = {
        field: {name: getattr(module, field) for name, module in plan.modules.items()}
        for field in _FIELDS
    }
    maps = [
        heat_map(field.replace("_", " "), values, _FIELDS[field])
        for field, values in measured.items()
        if None not in values.values()
    ]
    return write_page(path, "Plan", plan.summary(), maps)


def write_page(
    path: Path,
    title: str,
    summary: str,
    maps: Sequence[dict[str, Any]],
    charts: Mapping[str, tuple[str, Mapping[str, str]]] | None = None,
) -> Path:
    """Write a page of heat maps, atomically; return its path.

    Args:
        path: the file.
        title: the heading.
        summary: a few lines of text.
        maps: heat maps from `heat_map`.
        charts: by heading, a note and charts by caption.
    """
    context = {
        "title": title,
        "summary": summary.replace("\n", "; "),
        "maps": maps,
        "charts": charts or {},
        "data": "null",
    }
    with replacing_file(path) as part:
        part.write_text(html.render("plan.html.j2", context), encoding="utf-8")
    return path


def heat_map(title: str, values: Mapping[str, float], form: str) -> dict[str, Any]:
    """Return ``values`` by module as layers x projections, for the template.

    "same" is the text shared by all modules, if any; "shares" are relative to the largest
    magnitude, for colors.
    """
    grid = Grid.of(values)
    texts = {place: form.format(value) for place, value in grid.cells.items()}
    most = max(map(abs, values.values())) or 1
    return {
        "title": title,
        "grid": grid,
        "texts": texts,
        "shares": {place: round(abs(value) / most, 3) for place, value in grid.cells.items()},
        "same": next(iter(texts.values())) if len({*texts.values()}) == 1 else None,
    }


@dataclass(frozen=True)
class Grid(Generic[Module]):
    """Position of each module of a plan.

    "model.layers.3.mlp.up_proj" is in row "3", column "up_proj". Rows of a model with several
    stacks include the stack's name ("encoder.block.3"). A column is the last part of the module's
    name, or everything after the layer if the last part is ambiguous (BERT has several "dense").
    """

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Module]

    @classmethod
    def of(cls, modules: Mapping[str, Module]) -> Grid[Module]:
        """Lay out ``modules``, by full name; rows and columns in the order of the model."""
        parts = {name: split(name) for name in modules}
        stacks = {stack for stack, layer, _ in parts.values() if layer is not None}
        projections = {projection for *_, projection in parts.values()}
        short = {projection: projection.rpartition(".")[2] for projection in projections}
        if len(set(short.values())) < len(short):
            short = {projection: projection for projection in projections}
        cells = {}
        for name, (stack, layer, projection) in parts.items():
            row = str(layer) if len(stacks) == 1 else f"{stack}.{layer}"
            cells[OUTSIDE if layer is None else row, short[projection]] = modules[name]
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = list(dict.fromkeys(column for _, column in cells))
        return cls(rows, columns, cells)


def split(name: str) -> tuple[str, int | None, str]:
    """Split a module's name into stack, layer number and projection.

    Example:
        >>> split("model.layers.3.mlp.up_proj")
        ('model.layers', 3, 'mlp.up_proj')
    """
    words = name.split(".")
    for place, word in enumerate(words[:-1]):
        if word.isdigit():
            return ".".join(words[:place]), int(word), ".".join(words[place + 1 :])
    return "", None, name
