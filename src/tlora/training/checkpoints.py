"""The trainer's checkpoints, each with a manifest that marks a complete one.

The trainer writes a checkpoint-N folder file by file. When all files exist, in a process group
those of every process, ``manifest.json`` follows with the size and digest of each file that holds
state; it omits files that people edit (adapter_config.json, cards, the tokenizer's).
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError, ConfigError
from tlora.files import read_state, write_state
from tlora.integrity import MISMATCH, file_digest

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

# Weights, optimizer, scheduler, scaler, random states; sharded engines use subfolders.
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


def guard_checkpoints(trainer: Any, run_id: Callable[[], str | None]) -> None:
    """Make a trainer seal its checkpoints, and write no pickled arguments into them.

    The manifest is written before old checkpoints are deleted, so that a complete one always
    exists; a callback would run too late, so the trainer's own methods are wrapped.

    Args:
        trainer: of transformers or TRL.
        run_id: returns the id that distinguishes the run's checkpoints from another run's, once
            training has started.
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
            seal(folder / f"checkpoint-{step}", run_id())
            best = trainer.state.best_model_checkpoint
            delete_old(folder, limit, Path(best) if best else None)

    def load_whole() -> None:
        # A resumed run may have moved since its state was written.
        best = Path(arguments.output_dir) / Path(trainer.state.best_model_checkpoint).name
        trainer.state.best_model_checkpoint = str(best)
        if found := damage(best, run_id()):
            raise ArtifactError(
                f"{found}; delete this checkpoint, which is the best, and all later ones, "
                "and resume the run."
            )
        load_best()

    trainer._save_checkpoint, trainer._load_best_model = save_whole, load_whole
    trainer._save = _leaves_arguments_out(trainer._save)
    trainer._push_from_checkpoint = _leaves_arguments_out(trainer._push_from_checkpoint)


def check_engine(checkpoint: Path, deepspeed: bool, processes: int) -> None:
    """Check that an engine can resume from a checkpoint.

    Args:
        checkpoint: the folder.
        deepspeed: whether DeepSpeed trains now. All other engines write the same checkpoints.
        processes: number of processes that train now.

    Raises:
        ConfigError: DeepSpeed wrote it and does not train now, or not with the same number of
            processes; or DeepSpeed trains now and did not write it.
    """
    written = (checkpoint / "latest").is_file()
    writers = len(list(checkpoint.glob("rng_state*.pth")))
    if written == deepspeed and not (written and writers != processes):
        return
    how, advice = "without", "launch without DeepSpeed"
    if written:
        how, advice = "by", f"launch it with DeepSpeed and {writers} processes"
    raise ConfigError(
        f"{checkpoint} was written {how} DeepSpeed, whose checkpoints only fit "
        f"its own engine and one number of processes; {advice}.",
        where="run",
    )


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one, to the result of an uninterrupted training.

    Resumed from the checkpoint of its last step, a trainer would take one more step, and it resets
    the patience of early stopping. So the patience is restored, and a finished training only loads
    its weights.
    """
    from transformers import EarlyStoppingCallback, TrainerState

    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    # The run may have more steps or epochs than its state records.
    if trainer.args.max_steps > 0:
        ended = state.global_step >= trainer.args.max_steps
    else:
        ended = state.global_step >= state.max_steps
        ended &= trainer.args.num_train_epochs <= (state.epoch or 0)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            saved = state.stateful_callbacks[type(callback).__name__]["attributes"]
            callback.early_stopping_patience_counter = saved["early_stopping_patience_counter"]
            ended |= callback.early_stopping_patience_counter >= callback.early_stopping_patience
    if not ended:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    state.is_world_process_zero = trainer.is_world_process_zero()
    state.is_local_process_zero = trainer.is_local_process_zero()
    trainer.state = state
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        trainer._load_best_model()


def _leaves_arguments_out(method: Callable[..., None]) -> Callable[..., None]:
    """Make a trainer's method write no ``training_args.bin``.

    The trainer pickles its arguments, including a Hub token, beside the weights, and nothing reads
    the file.
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


def seal(checkpoint: Path, run_id: str | None = None) -> None:
    """Write the manifest of a complete checkpoint."""
    files = sorted({file for kind in _STATE for file in checkpoint.glob(kind) if file.is_file()})
    entries = {
        file.relative_to(checkpoint).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_digest(file),
        }
        for file in files
    }
    manifest = {"run": run_id, "step": step_of(checkpoint), "files": entries}
    write_state(checkpoint / MANIFEST, manifest)


def damage(checkpoint: Path, run_id: str | None = None) -> str | None:
    """Return the fault of a checkpoint, naming the first file; None if all files are unchanged.

    Args:
        checkpoint: the folder.
        run_id: id of the expected run; None: any run.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is missing, so the run was stopped while this checkpoint was written"
    try:
        found = read_state(manifest)
    except ArtifactError:
        return f"{manifest} is damaged"
    if run_id is not None and found["run"] != run_id:
        return f"{manifest} belongs to another run"
    if found["step"] != step_of(checkpoint):
        return f"{manifest} belongs to step {found['step']}"
    return next(_changed(checkpoint, found["files"]), None)


def _changed(checkpoint: Path, entries: dict[str, Any]) -> Iterator[str]:
    """Name a file that is missing or changed."""
    for name, entry in entries.items():
        file = checkpoint / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != entry["bytes"] or file_digest(file) != entry["sha256"]:
            yield f"{file}: {MISMATCH}"


def last_whole(folder: Path, run_id: str | None = None) -> Path | None:
    """Return the newest checkpoint in ``folder`` to resume a run from; None if there is none."""
    found = (path for path in reversed(checkpoints_in(folder)) if _unusable(path, run_id) is None)
    return next(found, None)


def rewind(folder: Path, run_id: str | None = None) -> Path | None:
    """Return the newest checkpoint to resume from, and remove the later ones, saying why.

    The trainer would write into their folders, and treat them as valid when it deletes old ones.
    """
    whole, later = None, []
    for path in reversed(checkpoints_in(folder)):
        if (fault := _unusable(path, run_id)) is None:
            whole = path
            break
        later.append((path, fault))
    goes_on = f"resumes from {whole.name}" if whole else "starts over"
    for path, fault in reversed(later):
        logger.warning("%s; the run %s.", fault, goes_on)
        shutil.rmtree(path)
    return whole


def delete_old(folder: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``, except the newest and the ``best`` one."""
    if not limit or limit < 0:
        return
    found = checkpoints_in(folder)
    kept = {found[-1].name, best.name if best else found[-1].name}
    old = [path for path in found if path.name not in kept]
    for path in old[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def _unusable(checkpoint: Path, run_id: str | None) -> str | None:
    """Return the reason why a run cannot be resumed from a checkpoint."""
    has_optimizer = (checkpoint / "optimizer.pt").is_file() or any(
        path.is_dir() for path in checkpoint.iterdir()
    )
    lack = None if has_optimizer else f"{checkpoint} holds no optimizer state"
    return damage(checkpoint, run_id) or lack


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint-N folders, by step."""
    found = (path for path in folder.glob("checkpoint-*") if step_of(path))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return N of a folder named checkpoint-N, or 0."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else 0
