"""Inspect any LoRA module by module, or the difference of two: table, page and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from tlora.adapter.saved import SavedLora
from tlora.errors import AdapterError, listed
from tlora.exporters.truncate import spectrum
from tlora.exporters.updates import both, cosine, effective_rank, overlap
from tlora.files import write_json
from tlora.report import parameters
from tlora.report.charts import panels
from tlora.report.heatmap import heat_map, write_page
from tlora.report.parameters import Entries, Norms
from tlora.report.tables import groups, plain
from tlora.training.model_card import span

if TYPE_CHECKING:
    from rich.table import Table

Module = TypeVar("Module", "Update", "Change")


@dataclass(frozen=True)
class Update:
    """The update s B A of one module.

    Attributes:
        rank: rows of A.
        scale: s.
        norm: its Frobenius norm.
        effective_rank: exp of the entropy of its normalized singular values.
        bytes: stored size of A and B.
        singular_values: singular values in descending order.
        a: the entries of A.
        b: the entries of B.
    """

    rank: int
    scale: float
    norm: float
    effective_rank: float
    bytes: int
    singular_values: list[float]
    a: Entries
    b: Entries


@dataclass(frozen=True)
class Change:
    """The update of one module in two adapters, 1 and 2.

    Attributes:
        norm: norm of the first, ||s_1 B_1 A_1||.
        other: norm of the second.
        difference: norm of the difference over ``norm``; None if that is zero.
        cosine: cosine of the two as vectors, <D_1, D_2> / (||D_1|| ||D_2||); None if one is zero.
        overlap: ||V_1^T V_2||_F^2 / min(r_1, r_2) of the row spaces' orthonormal bases.
        leading: the same for the first k right singular vectors, with k the smaller of their
            effective ranks, rounded.
        angle: the largest principal angle of the row spaces, in degrees.
    """

    norm: float
    other: float
    difference: float | None
    cosine: float | None
    overlap: float
    leading: float
    angle: float


@dataclass(frozen=True)
class Inspection(Generic[Module]):
    """Contents of the page for one or two adapters."""

    title: str
    summary: str
    modules: dict[str, Module]
    forms: Mapping[str, str]
    """Fields with a heat map, and their number formats."""
    training: Norms = field(default_factory=dict)
    """The norms by step, if a run kept several checkpoints."""


def inspect(lora: SavedLora, checkpoints: Path | None = None) -> Inspection[Update]:
    """Measure an adapter, and the checkpoints of its run if there are several."""
    found = {}
    for name in lora.keys:
        factors = lora.factors(name)
        values = spectrum(factors)
        found[name] = Update(
            rank=factors.rank,
            scale=factors.scale,
            norm=float(values.norm()),
            effective_rank=effective_rank(values),
            bytes=factors.a.nbytes + factors.b.nbytes,
            singular_values=values.tolist(),
            a=Entries.of(factors.a),
            b=Entries.of(factors.b),
        )
    ranks, scales = [u.rank for u in found.values()], [u.scale for u in found.values()]
    lines = [
        f"base model {lora.base or '(not named)'}",
        f"{len(found)} modules, rank {span(ranks)} ({sum(ranks)} in total)",
        f"scale {span(scales)}",
        f"norm of the whole update {math.hypot(*(u.norm for u in found.values())):.4g}",
        f"{sum(u.bytes for u in found.values()):,} bytes of A and B",
    ]
    lines += [f"also has {words}" for words in lora.lacks()]
    forms = {"rank": "{}", "scale": "{:.2f}", "norm": "{:.3g}", "effective_rank": "{:.1f}"}
    norms = parameters.norms_by_step(checkpoints) if checkpoints else {}
    several = any(len(line) > 1 for modules in norms.values() for line in modules.values())
    return Inspection("Adapter", "\n".join(lines), found, forms, norms if several else {})


def against(lora: SavedLora, other: SavedLora) -> Inspection[Change]:
    """Compare two adapters module by module; the summary lists modules that only one has.

    Raises:
        AdapterError: they share no module, or a module's size differs between them.
    """
    shared = [name for name in lora.keys if name in other.keys]
    if not shared:
        raise AdapterError(
            f"{lora.path} and {other.path} have no adapted module in common; give two comparable"
            " adapters."
        )
    changes = {name: _change(lora, other, name) for name in shared}
    own = math.hypot(*(c.norm for c in changes.values()))
    off = math.hypot(*((c.difference or 0.0) * c.norm for c in changes.values()))
    lines = [f"{lora.path} against {other.path}: {len(shared)} modules"]
    if own:
        lines.append(f"difference {off / own:.3g} of the first's norm {own:.4g}")
    for path, names, others in (
        (lora.path, lora.keys, other.keys),
        (other.path, other.keys, lora.keys),
    ):
        if alone := [name for name in names if name not in others]:
            lines.append(f"only in {path}: {listed(alone)}")
    forms = {"difference": "{:.2g}", "cosine": "{:.2f}", "overlap": "{:.2f}"}
    forms |= {"leading": "{:.2f}", "angle": "{:.0f}"}
    return Inspection("Two adapters", "\n".join(lines), changes, forms)


def _change(lora: SavedLora, other: SavedLora, name: str) -> Change:
    one, two = lora.factors(name), other.factors(name)
    try:
        plain_one, second = both(one, two)
    except ValueError as sizes:
        raise AdapterError(
            f"{lora.path} and {other.path} adapt different models: {name} is {sizes}; give adapters"
            " of one base."
        ) from sizes
    first = one.scale * plain_one
    norm = float(first.norm())
    share, angle = overlap(one, two)
    ranks = [effective_rank(torch.linalg.svdvals(each)) for each in (first, second)]
    off = float((first - second).norm())
    return Change(
        norm=norm,
        other=float(second.norm()),
        difference=off / norm if norm else None,
        cosine=cosine(first, second),
        overlap=share,
        leading=overlap(one, two, max(1, round(min(ranks))))[0],
        angle=angle,
    )


def table(found: Inspection[Any], by: str) -> Table:
    """Return the table with one line per module, layer or projection."""
    line = _update_line if found.title == "Adapter" else _change_line
    head = _HEADS[line]
    rows = [[name, *line(group)] for name, group in groups(found.modules, by).items()]
    return plain([by, *head], rows, [["all", *line([*found.modules.values()])]])


def _update_line(updates: Sequence[Update]) -> list[str]:
    count = len(updates)
    return [
        f"{sum(u.rank for u in updates)}",
        f"{sum(u.scale for u in updates) / count:.3f}",
        f"{math.hypot(*(u.norm for u in updates)):.4g}",
        f"{max((v for u in updates for v in u.singular_values[:1]), default=0.0):.3g}",
        f"{sum(u.effective_rank for u in updates) / count:.1f}",
        f"{sum(u.bytes for u in updates):,}",
    ]


def _change_line(changes: Sequence[Change]) -> list[str]:
    count = len(changes)
    norms = [
        math.hypot(*values) for values in ([c.norm for c in changes], [c.other for c in changes])
    ]
    off = math.hypot(*((c.difference or 0.0) * c.norm for c in changes))
    dot = sum((c.cosine or 0.0) * c.norm * c.other for c in changes)
    return [
        *(f"{norm:.4g}" for norm in norms),
        f"{off / norms[0]:.3g}" if norms[0] else "-",
        f"{dot / math.prod(norms):.3f}" if all(norms) else "-",
        f"{sum(c.overlap for c in changes) / count:.3f}",
        f"{sum(c.leading for c in changes) / count:.3f}",
        f"{max(c.angle for c in changes):.0f}\N{DEGREE SIGN}",
    ]


_HEADS: dict[Any, list[str]] = {
    _update_line: ["rank", "scale", "norm", "largest", "eff. rank", "bytes"],
    _change_line: ["norm", "other", "difference", "cosine", "overlap", "leading", "angle"],
}


def write(found: Inspection[Any], page: Path) -> tuple[Path, Path]:
    """Write the page and a JSON file with the same numbers; return both paths."""
    columns = {
        field: {name: getattr(module, field) for name, module in found.modules.items()}
        for field in found.forms
    }
    known = {f: {n: v for n, v in values.items() if v is not None} for f, values in columns.items()}
    maps = [
        heat_map(field.replace("_", " "), values, found.forms[field])
        for field, values in known.items()
        if values
    ]
    charts = _charts(found) if found.title == "Adapter" else {}
    write_page(page, found.title, found.summary, maps, charts)
    rows = {name: asdict(module) for name, module in found.modules.items()}
    numbers = page.with_suffix(".json")
    training = {"training": found.training} if found.training else {}
    write_json(numbers, {"summary": found.summary.splitlines(), "modules": rows, **training})
    return page, numbers


def _charts(found: Inspection[Update]) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Return the charts of an adapter with notes, by heading."""
    named = groups(found.modules, "projection")
    spectra = {name: [_spectrum(u) for u in updates] for name, updates in named.items()}
    drawn = {
        "singular values": (
            "One line per module: its singular values relative to the largest.",
            panels(
                {
                    name: long
                    for name, lines in spectra.items()
                    if (long := list(filter(None, lines)))
                },
                "singular values over the largest",
            ),
        )
    }
    for matrix, of in (("A", "a"), ("B", "b")):
        lines = {n: [getattr(u, of).against_gaussian() for u in us] for n, us in named.items()}
        drawn[f"entries of {matrix}"] = (
            "One line per module: quantiles of the entries, in standard deviations, against those"
            " of a Gaussian. A straight diagonal is a Gaussian; flat ends have no large entries.",
            panels(lines, f"quantiles of the entries of {matrix}", log_y=False),
        )
    drawn["norms over training"] = (
        "One line per module: the norm of its parameters at each checkpoint, by step.",
        panels(parameters.curves(found.training), "norm by step"),
    )
    return {heading: chart for heading, chart in drawn.items() if chart[1]}


def _spectrum(update: Update) -> list[tuple[float, float]]:
    """Return the singular values relative to the largest, by index; none if there is only one."""
    values = update.singular_values
    points = [(k, v / values[0]) for k, v in enumerate(values, 1) if v > _FLOOR * values[0]]
    return [(float(k), v) for k, v in points] if len(points) > 1 else []


_FLOOR = 1e-8
"""Singular values smaller than this, relative to the largest, are rounding noise."""
