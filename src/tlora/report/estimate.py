"""A dry run as tables: what is adapted, what calibration takes, what training takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tlora.config import bytes_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tlora.stages.dryrun import DryRun
    from tlora.stages.estimate import ModuleShape, TrainingEstimate


def show(dry: DryRun, console: Console | None = None) -> None:
    """Print a dry run on ``console``, by default on standard output."""
    from rich.console import Console

    console = console or Console()
    size = f"{dry.weights.parameters:,} parameters, {bytes_text(dry.weights.bytes)}"
    line = f"{dry.model}: {size} in {dry.assumptions.dtype}. No weight was read, nothing written."
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
    """Return the memory of calibration, phase by phase, and its time."""
    found, assumed = dry.calibration, dry.assumptions
    strategy = found.strategy
    made = _table("calibration and planning")
    made.add_column("memory", justify="right", no_wrap=True)
    sharing = f"{len({m.source for m in dry.modules})} inputs of {len(dry.modules)} modules"
    if found.unshared != strategy.total:
        sharing += f"; {bytes_text(found.unshared)} if none were shared"
    if strategy.held < strategy.total:
        sharing += f"; {bytes_text(strategy.total)} at once"
    made.add_row("weights", bytes_text(found.weights))
    made.add_row(f"{strategy.kind}, float32 ({sharing})", bytes_text(strategy.held))
    made.add_row(f"mean rows of {assumed.samples} samples", bytes_text(found.means))
    batch = assumed.batch(assumed.calibration_batch)
    made.add_row(
        f"batch: activations kept for the backward ({batch})", bytes_text(found.activations)
    )
    made.add_row("batch: loss, or rows in float32", bytes_text(found.loss))
    made.add_row("batch: the largest dense gradient term, |W|", bytes_text(found.sensitivity))
    made.add_row(
        "planning: matrices and SVD of one module, the largest", bytes_text(found.planning)
    )
    made.add_row("planning: A of all modules", bytes_text(found.factors))
    made.add_section()
    made.add_row("peak (the larger of batch and planning)", bytes_text(found.peak), style="bold")
    made.add_row("time (estimate)", duration(found.flops / assumed.rate), style="bold")
    return made


def training_table(dry: DryRun) -> Table:
    """Return memory and time of training: task-aware LoRA, LoRA at the same rank, everything."""
    assumed = dry.assumptions
    made = _table(f"training, {assumed.batch(assumed.training_batch)} at a time")
    for way in dry.training:
        made.add_column(way.name, justify="right", no_wrap=True)
    batches = assumed.batches or 1
    span = f"{batches:,} batches" if assumed.batches else "a batch"

    def add(title: str, value: Callable[[TrainingEstimate], str], style: str = "") -> None:
        made.add_row(title, *map(value, dry.training), style=style)

    add("trainable parameters", lambda t: f"{t.trainable:,}")
    add("weights", lambda t: bytes_text(t.weights))
    add("gradients", lambda t: bytes_text(t.gradients))
    add("AdamW states", lambda t: bytes_text(t.optimizer))
    add("activations", lambda t: bytes_text(t.activations))
    add("the same, gradient checkpointing", lambda t: bytes_text(t.checkpointed))
    made.add_section()
    add("peak", lambda t: bytes_text(t.peak(False)), "bold")
    add("the same, gradient checkpointing", lambda t: bytes_text(t.peak(True)), "bold")
    add(f"time of {span} (estimate)", lambda t: duration(batches * t.flops / assumed.rate), "bold")
    add(
        "the same, gradient checkpointing",
        lambda t: duration(batches * t.checkpointed_flops / assumed.rate),
        "bold",
    )
    return made


def millions(count: int) -> str:
    """Return parameters as text: "174.06M", or all digits below a million."""
    return f"{count:,}" if count < 10**6 else f"{count / 10**6:,.2f}M"


def duration(seconds: float) -> str:
    """Return seconds as text with two or three digits: "4.2 min"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


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


def _assumed(dry: DryRun) -> list[str]:
    a = dry.assumptions
    return [
        f"Assumed: weights in {a.dtype} on one device; {a.samples} calibration samples, batches of"
        f" {a.batch(a.calibration_batch)} to calibrate and of {a.batch(a.training_batch)} to train,"
        " none shorter; no autocast, but in `full` on 16-bit weights; AdamW with two states a"
        " parameter; what trains in float32. Activations are those of a CPU, whose attention keeps"
        " a T x T matrix only where it has dropout or the model offers no other.",
        f"Rank {dry.rank} everywhere it fits: sensitivity moves ranks between modules, and with"
        " them parameters.",
        f"Time is work over a rate of {a.rate:.3g} FLOP/s ({a.rate_source}): an estimate, low where"
        " memory or the SVD is the brake; --flops sets the rate.",
    ]
