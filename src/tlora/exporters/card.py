"""The model card of an exported folder: contents, compatible readers and serving command."""

from __future__ import annotations

from pathlib import Path

from tlora.credentials import redacted
from tlora.exporters.base import Source
from tlora.training.model_card import CARD, public, span


def write(
    folder: Path,
    source: Source,
    form: str,
    notes: list[str],
    exact: list[str],
    command: str,
) -> None:
    """Write README.md into an exported folder, showing only the last part of local paths."""
    base = public(source.base) if source.base else "(not named)"
    ranks = [source.lora.rank(name) for name in source.lora.keys]
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'transformers' if form == 'merged' else 'peft'}",
        "tags: [lora, tlora]",
        "---",
        "",
        f"# {base}, adapted: `{form}`",
        "",
        f"- base model: `{base}`",
        f"- ranks: {span(ranks)} in {len(ranks)} modules",
        f"- format: `{form}`, written by `tlora export`",
    ]
    if exact:
        lines.append(f"- read exactly by: {', '.join(exact)}")
    lines += [f"- {note}" for note in notes]
    shown = command.replace(source.base, base) if source.base else command
    lines += ["", "Serve it:", "", f"    {shown}"] if shown else []
    (folder / CARD).write_text(redacted("\n".join(lines)) + "\n", encoding="utf-8")
