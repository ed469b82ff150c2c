"""A dry run as tables: what is adapted, what calibration takes, what training takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tlora.config import bytes_text
from tlora.report.tables import plain

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
    head = ("adapted (* is any layer)", "modules", "m x d", "rank", "inputs", "tlora", "lora")
    groups = [[name, *_cells(dry, group)] for name, group in _projections(dry.modules).items()]
    all_of_them = [["all", *_cells(dry, dry.modules)]]
    if dry.others:
        beside = millions(dry.others)
        all_of_them.append(["trained beside (head, biases)", "", "", "", "", beside, beside])
    return plain(head, groups, all_of_them)


def calibration_table(dry: DryRun) -> Table:
    """Return the memory of calibration, phase by phase."""
    found, strategy = dry.calibration, dry.calibration.strategy
    sharing = f"{len({m.source for m in dry.modules})} inputs of {len(dry.modules)} modules"
    if strategy.held < strategy.total:
        sharing += f"; {bytes_text(strategy.total)} at once"
    batch = _batch(dry, dry.batches.calibration)
    parts = {
        "weights": found.weights,
        f"{strategy.kind}, float32 ({sharing})": strategy.held,
        f"mean inputs of {dry.batches.samples} samples": found.means,
        f"batch of {batch}: activations and loss": found.activations,
        "planning: the largest module, and A of all": found.planning,
    }
    peak = ("peak (the larger of batch and planning)", bytes_text(found.peak))
    return plain(
        ("calibration and planning", "memory"),
        [(name, bytes_text(size)) for name, size in parts.items()],
        [peak, ("fits in", fits_in(found.peak))],
    )


def training_table(dry: DryRun) -> Table:
    """Return the memory of training: task-aware LoRA, LoRA at the same rank, everything."""
    ways = dry.training
    sections = [
        [
            ["trainable parameters", *(f"{t.trainable:,}" for t in ways)],
            ["weights", *(bytes_text(t.weights) for t in ways)],
            ["gradients", *(bytes_text(t.gradients) for t in ways)],
            ["AdamW states", *(bytes_text(t.optimizer) for t in ways)],
        ]
    ]
    for again, title in ((False, ""), (True, ", gradient checkpointing")):
        kept = [t.checkpointed if again else t.activations for t in ways]
        peaks = [t.peak(again) for t in ways]
        sections.append(
            [
                [f"activations{title}", *map(bytes_text, kept)],
                [f"peak{title}", *map(bytes_text, peaks)],
                ["fits in", *map(fits_in, peaks)],
            ]
        )
    head = f"training, {_batch(dry, dry.batches.training)} at a time"
    return plain((head, *(way.name for way in ways)), *sections)


def fits_in(size: int) -> str:
    """Return the smallest usual memory of a GPU that holds ``size`` bytes: "24 GiB"."""
    fitting = (gib for gib in _MEMORIES if size <= gib * 2**30)
    return next((f"{gib} GiB" for gib in fitting), "several GPUs")


def millions(count: int) -> str:
    """Return parameters as text: "174.06M", or all digits below a million."""
    return f"{count:,}" if count < 10**6 else f"{count / 10**6:,.2f}M"


def _projections(modules: Iterable[ModuleShape]) -> dict[str, list[ModuleShape]]:
    groups: dict[str, list[ModuleShape]] = {}
    for module in modules:
        name = re.sub(r"(?<![^.[])\d+(?![^.\]])", "*", module.name)
        groups.setdefault(name, []).append(module)
    return groups


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
