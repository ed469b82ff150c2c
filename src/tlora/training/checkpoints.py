"""The trainer's checkpoints, each with a manifest that tells a whole one from the rest.

The trainer writes a checkpoint-N folder file by file. When all of them are there, and in a process
group those of every rank, ``manifest.json`` follows with the size and the digest of each file that
holds state; files that people edit (adapter_config.json, cards, the tokenizer's) are not in it.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError
from tlora.files import read_state, write_state
from tlora.integrity import MISMATCH, file_digest

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

# Weights, optimizer, scheduler, scaler, random states; sharded engines keep theirs in folders.
_STATE = (
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "trainer_state.json",
    "latest",
    "*/**/*",
)


def guard_checkpoints(trainer: Any) -> None:
    """Let a trainer seal its checkpoints, and leave its pickled arguments out of them.

    The manifest is written before old checkpoints are deleted, so that a whole one is there at any
    moment; a callback would come after that, hence the trainer's own methods.
    """
    save_checkpoint, load_best = trainer._save_checkpoint, trainer._load_best_model
    arguments = trainer.args

    def save_whole(model: Any, trial: Any) -> None:
        limit, arguments.save_total_limit = arguments.save_total_limit, None
        try:
            save_checkpoint(model, trial)
        finally:
            arguments.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()
        if arguments.should_save:
            folder, step = Path(arguments.output_dir), trainer.state.global_step
            seal(folder / f"checkpoint-{step}")
            best = trainer.state.best_model_checkpoint
            delete_old(folder, limit, Path(best) if best else None)

    def load_whole() -> None:
        # A resumed run may lie in another place than the one that its state names.
        best = Path(arguments.output_dir) / Path(trainer.state.best_model_checkpoint).name
        trainer.state.best_model_checkpoint = str(best)
        if found := damage(best):
            raise ArtifactError(
                f"{found}; delete this checkpoint, which is the best, and all later ones, and"
                " resume the run."
            )
        load_best()

    trainer._save_checkpoint, trainer._load_best_model = save_whole, load_whole
    trainer._save = _leaves_arguments_out(trainer._save)
    trainer._push_from_checkpoint = _leaves_arguments_out(trainer._push_from_checkpoint)


def _leaves_arguments_out(method: Callable[..., None]) -> Callable[..., None]:
    """Let a trainer's method write no ``training_args.bin``.

    The trainer pickles its arguments beside the weights, a token of the Hub among them, and nothing
    reads the file.
    """
    import torch
    from transformers import TrainingArguments

    def wrapped(*args: Any, **kwargs: Any) -> None:
        save = torch.save

        def others(value: Any, *rest: Any, **options: Any) -> None:
            if not isinstance(value, TrainingArguments):
                save(value, *rest, **options)

        torch.save = others  # type: ignore[assignment]
        try:
            method(*args, **kwargs)
        finally:
            torch.save = save

    return wrapped


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint that is whole."""
    files = sorted({file for kind in _STATE for file in checkpoint.glob(kind) if file.is_file()})
    entries = {
        file.relative_to(checkpoint).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_digest(file),
        }
        for file in files
    }
    write_state(checkpoint / MANIFEST, {"step": _step(checkpoint), "files": entries})


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, naming the first that is; None if all
    are as they were written."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is missing, so the run was stopped while this checkpoint was written"
    try:
        found = read_state(manifest)
    except ArtifactError:
        return f"{manifest} is damaged"
    if found["step"] != _step(checkpoint):
        return f"{manifest} is of step {found['step']}"
    for name, entry in found["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"] or file_digest(file) != entry["sha256"]:
            return f"{file}: {MISMATCH}"
    return None


def last_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint in ``folder`` to resume from; None if there is none."""
    found = (path for path in reversed(_checkpoints(folder)) if _unusable(path) is None)
    return next(found, None)


def rewind(folder: Path) -> Path | None:
    """Return the newest checkpoint to resume from, and remove the later ones, saying why.

    The trainer would write into their folders, and count them as good when it deletes old ones.
    """
    whole = last_whole(folder)
    goes_on = f"resumes from {whole.name}" if whole else "starts over"
    for path in _checkpoints(folder):
        if whole is None or _step(path) > _step(whole):
            logger.warning("%s; the run %s.", _unusable(path), goes_on)
            shutil.rmtree(path)
    return whole


def delete_old(folder: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; the newest and the ``best`` one stay."""
    if not limit or limit < 0:
        return
    found = _checkpoints(folder)
    kept = {found[-1].name, best.name if best else found[-1].name}
    old = [path for path in found if path.name not in kept]
    for path in old[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def _unusable(checkpoint: Path) -> str | None:
    """Return why a run cannot be resumed from a checkpoint."""
    has_optimizer = (checkpoint / "optimizer.pt").is_file() or any(
        path.is_dir() for path in checkpoint.iterdir()
    )
    lack = None if has_optimizer else f"{checkpoint} holds no state of the optimizer"
    return damage(checkpoint) or lack


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint-N folders, by step."""
    found = (path for path in folder.glob("checkpoint-*") if _step(path))
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else 0
