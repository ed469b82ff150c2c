"""A dry run as text: adapted modules, and memory of calibration and training."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tlora.config import bytes_text
from tlora.report.tables import plain
from tlora.training.activations import FLOAT
from tlora.training.dryrun import DryRun, adapter_parameters

if TYPE_CHECKING:
    from rich.table import Table

    from tlora.calibration.weights import Target

_MEMORIES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192)


def show(dry: DryRun) -> None:
    """Print a dry run on standard output."""
    from rich.console import Console

    console = Console()
    size = f"{dry.parameters:,} parameters, {bytes_text(dry.calibration.weights)}"
    line = f"{dry.model}: {size} in {dry.dtype}. tlora read no weights and wrote no files."
    console.print(line, highlight=False, soft_wrap=True)
    console.print(_modules(dry))
    console.print(_memory(dry))
    how = dry.strategy.summary()
    if dry.budget.bytes is not None:
        how += f"; `memory_budget`: {dry.budget.explained()}"
    trained = "float32" if dry.training[0].element == FLOAT else "bfloat16"
    assumed = (
        "Assumptions: one device; full-length samples; a fused attention kernel if the model has"
        f" one; AdamW; trainable parameters in {trained}; ranks at equal sensitivities. Second"
        " moments include each sample's mean. Activations are estimated; the rest is exact."
    )
    for line in [f"{how[0].upper()}{how[1:]}.", *dry.notes, assumed]:
        console.print(line, highlight=False, soft_wrap=True)


def _modules(dry: DryRun) -> Table:
    """Return the targets by projection, with layer and expert indices replaced by `*`."""
    groups: dict[tuple[str, str, int], list[Target]] = {}
    for target in dry.targets:
        name = re.sub(r"(?<![^.[])\d+(?![^.\]])", "*", target.name)
        key = (name, f"{target.d_out} x {target.d_in}", dry.ranks[target.name])
        groups.setdefault(key, []).append(target)
    rows = [
        (name, f"{len(group)}", shape, f"{rank}", f"{_trained(dry, group):,}")
        for (name, shape, rank), group in groups.items()
    ]
    return plain(("adapted", "modules", "m x d", "rank", "trainable"), rows)


def _trained(dry: DryRun, group: list[Target]) -> int:
    return adapter_parameters(group, dry.ranks, dry.frozen_a)


def _memory(dry: DryRun) -> Table:
    """Return the memory of calibration, and of training with TLoRA, LoRA and in full."""
    ways = [dry.calibration, *dry.training]
    sizes = {
        "weights": [way.weights for way in ways],
        dry.strategy.kind: [way.moments for way in ways],
        "gradients": [way.gradients for way in ways],
        "AdamW states": [way.optimizer for way in ways],
        "activations": [way.activations for way in ways],
    }
    rows = [("trainable parameters", *(f"{way.trainable:,}" for way in ways))]
    rows += [(name, *map(bytes_text, each)) for name, each in sizes.items()]
    peaks: list[tuple[str, ...]] = []
    for how, again in (("", False), (", checkpointed", True)):
        most = [way.peak(again) for way in ways]
        peaks += [(f"peak{how}", *map(bytes_text, most)), (f"fits in{how}", *map(fits_in, most))]
    head = (f"samples of {dry.length} tokens", *(way.name for way in ways))
    return plain(head, rows, peaks)


def fits_in(size: int) -> str:
    """Return the smallest usual memory of a GPU that holds ``size`` bytes: "24 GiB"."""
    fitting = (gib for gib in _MEMORIES if size <= gib * 2**30)
    return next((f"{gib} GiB" for gib in fitting), "several GPUs")
