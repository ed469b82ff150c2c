"""Tables of plans, with one line per module, layer or projection, and other tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from tlora.report.heatmap import Grid

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tlora.adapter.plan import AdapterPlan, ModulePlan

Module = TypeVar("Module")
VIEWS = ("module", "layer", "projection")


def show(plan: AdapterPlan, by: str = "module", console: Console | None = None) -> None:
    """Print the table of ``plan`` on ``console``, by default standard output."""
    from rich.console import Console

    (console or Console()).print(table(plan, by))


def table(plan: AdapterPlan, by: str = "module") -> Table:
    """Return the table; groups of modules sum ranks and parameters, and average the rest.

    "captured energy" is the fraction of ||W C||_F^2 captured by the subspace of A.
    """
    counted = by != "module"
    head = [by, "modules", "rank", "scale", "sensitivity", "captured energy", "parameters"]
    rows = [
        [name, *_line(plan, group, counted)] for name, group in groups(plan.modules, by).items()
    ]
    total = ["all", *_line(plan, list(plan.modules.values()), counted)]
    return plain(head if counted else [by, *head[2:]], rows, [total])


def plain(head: Sequence[str], *sections: Iterable[Sequence[str]]) -> Table:
    """Return a table of names and right-aligned numbers, with separated sections."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    # On a narrow terminal names wrap, because a truncated number would be wrong.
    made.add_column(head[0], overflow="fold")
    for column in head[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    for section in sections:
        made.add_section()
        for row in section:
            made.add_row(*row)
    return made


def groups(modules: Mapping[str, Module], by: str) -> dict[str, list[Module]]:
    """Return the modules of each table line, grouped by full name."""
    if by == "module":
        return {name: [module] for name, module in modules.items()}
    grid = Grid.of(modules)
    found: dict[str, list[Module]] = {}
    for place, module in grid.cells.items():
        found.setdefault(place[VIEWS.index(by) - 1], []).append(module)
    return found


def _line(plan: AdapterPlan, modules: list[ModulePlan], counted: bool) -> list[str]:
    parameters = sum(module.parameters(plan.config.freeze_a) for module in modules)
    cells = [
        f"{sum(m.rank for m in modules)}",
        _mean((m.scale for m in modules), "{:.3f}"),
        _mean((m.sensitivity for m in modules), "{:.2e}"),
        _mean((m.captured_energy for m in modules), "{:.4f}"),
        f"{parameters:,}",
    ]
    return [f"{len(modules)}", *cells] if counted else cells


def _mean(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else "-"
