"""A dry run as tables: what is adapted, what calibration takes, what training takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tlora.config import bytes_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tlora.training.dryrun import DryRun, ModuleShape

_MEMORIES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192)


def show(dry: DryRun, console: Console | None = None) -> None:
    """Print a dry run on ``console``, by default on standard output."""
    from rich.console import Console

    console = console or Console()
    size = f"{dry.parameters:,} parameters, {bytes_text(dry.calibration.weights)}"
    line = f"{dry.model}: {size} in {dry.dtype}. No weight was read, nothing written."
    console.print(line, highlight=False, soft_wrap=True)
    console.print(modules_table(dry))
    console.print(calibration_table(dry))
    console.print(training_table(dry))
    how = dry.calibration.strategy.summary()
    for line in [f"{how[0].upper()}{how[1:]}.", *dry.notes, *_assumed(dry)]:
        console.print(line, highlight=False, soft_wrap=True)


def modules_table(dry: DryRun) -> Table:
    """Return the targets by projection: indexes of layers and experts in a name become `*`."""
    made = _table("adapted (* is any layer)")
    made.columns[0].overflow = "fold"
    for column in ("modules", "m x d", "rank", "inputs", "tlora", "lora"):
        made.add_column(column, justify="right", no_wrap=True)
    groups = _projections(dry.modules)
    common = _common_prefix(list(groups))
    for name, group in groups.items():
        made.add_row(name.removeprefix(common), *_cells(dry, group))
    made.add_section()
    made.add_row("all", *_cells(dry, dry.modules), style="bold")
    if dry.others:
        beside = millions(dry.others)
        made.add_row("trained beside (head, biases)", "", "", "", "", beside, beside)
    return made


def calibration_table(dry: DryRun) -> Table:
    """Return the memory of calibration, phase by phase."""
    found, strategy = dry.calibration, dry.calibration.strategy
    made = _table("calibration and planning")
    made.add_column("memory", justify="right", no_wrap=True)
    sharing = f"{len({m.source for m in dry.modules})} inputs of {len(dry.modules)} modules"
    if strategy.held < strategy.total:
        sharing += f"; {bytes_text(strategy.total)} at once"
    batch = _batch(dry, dry.batches.calibration)
    made.add_row("weights", bytes_text(found.weights))
    made.add_row(f"{strategy.kind}, float32 ({sharing})", bytes_text(strategy.held))
    made.add_row(f"mean inputs of {dry.batches.samples} samples", bytes_text(found.means))
    made.add_row(f"batch of {batch}: activations and loss", bytes_text(found.activations))
    made.add_row("planning: the largest module, and A of all", bytes_text(found.planning))
    made.add_section()
    made.add_row("peak (the larger of batch and planning)", bytes_text(found.peak), style="bold")
    made.add_row("fits in", fits_in(found.peak), style="bold")
    return made


def training_table(dry: DryRun) -> Table:
    """Return the memory of training: task-aware LoRA, LoRA at the same rank, everything."""
    made = _table(f"training, {_batch(dry, dry.batches.training)} at a time")
    for way in dry.training:
        made.add_column(way.name, justify="right", no_wrap=True)

    def add(title: str, texts: Iterable[str], style: str = "") -> None:
        made.add_row(title, *texts, style=style)

    ways = dry.training
    add("trainable parameters", (f"{t.trainable:,}" for t in ways))
    add("weights", (bytes_text(t.weights) for t in ways))
    add("gradients", (bytes_text(t.gradients) for t in ways))
    add("AdamW states", (bytes_text(t.optimizer) for t in ways))
    for again, title in ((False, ""), (True, ", gradient checkpointing")):
        made.add_section()
        kept = [t.checkpointed if again else t.activations for t in ways]
        add(f"activations{title}", map(bytes_text, kept))
        add(f"peak{title}", (bytes_text(t.peak(again)) for t in ways), "bold")
        add("fits in", (fits_in(t.peak(again)) for t in ways), "bold")
    return made


def fits_in(size: int) -> str:
    """Return the smallest usual memory of a GPU that holds ``size`` bytes: "24 GiB"."""
    fitting = (gib for gib in _MEMORIES if size <= gib * 2**30)
    return next((f"{gib} GiB" for gib in fitting), "several GPUs")


def millions(count: int) -> str:
    """Return parameters as text: "174.06M", or all digits below a million."""
    return f"{count:,}" if count < 10**6 else f"{count / 10**6:,.2f}M"


def _table(first: str) -> Table:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    made.add_column(first)
    return made


def _projections(modules: Iterable[ModuleShape]) -> dict[str, list[ModuleShape]]:
    groups: dict[str, list[ModuleShape]] = {}
    for module in modules:
        name = re.sub(r"(?<![^.[])\d+(?![^.\]])", "*", module.name)
        groups.setdefault(name, []).append(module)
    return groups


def _common_prefix(names: Sequence[str]) -> str:
    """Return the leading components that all names share, each name's last one left out."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join([*shared, ""])


def _cells(dry: DryRun, group: Sequence[ModuleShape]) -> list[str]:
    shapes = {(m.d_out, m.d_in) for m in group}
    ranks = {m.rank for m in group}
    lora = dry.rank * sum(m.d_out + m.d_in for m in group)
    ours = sum(m.rank * m.d_out for m in group)
    return [
        f"{len(group)}",
        "{} x {}".format(*shapes.pop()) if len(shapes) == 1 else "",
        f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}",
        f"{len({m.source for m in group})}",
        millions(ours),
        millions(lora),
    ]


def _batch(dry: DryRun, size: int) -> str:
    return f"{size} x {dry.batches.length} {dry.batches.unit}"


def _assumed(dry: DryRun) -> list[str]:
    return [
        f"Assumed: weights in {dry.dtype} on one device; full-length samples; attention in a fused"
        " kernel, as on a GPU, where the model has one; AdamW with two states a parameter; what"
        " trains in float32. Weights, gradients, AdamW states and moments are exact, activations"
        " are by formula.",
        f"Rank {dry.rank} everywhere it fits: sensitivity moves ranks between modules, and with"
        " them parameters.",
    ]
