"""The trainer's checkpoints, each with a manifest that tells a whole one from the rest.

The trainer writes a checkpoint-N folder file by file. When all of them are there, and in a process
group those of every rank, ``manifest.json`` follows with the size and the digest of each file that
holds state; files that people edit (adapter_config.json, cards, the tokenizer's) are not in it.
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


def guard_checkpoints(trainer: Any, run_id: Callable[[], str | None]) -> None:
    """Let a trainer seal its checkpoints, and leave its pickled arguments out of them.

    The manifest is written before old checkpoints are deleted, so that a whole one is there at any
    moment; a callback would come after that, hence the trainer's own methods.

    Args:
        trainer: of transformers or TRL.
        run_id: returns what tells the run's checkpoints from another run's, once training started.
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
        # A resumed run may lie in another place than the one that its state names.
        best = Path(arguments.output_dir) / Path(trainer.state.best_model_checkpoint).name
        trainer.state.best_model_checkpoint = str(best)
        if found := damage(best, run_id()):
            raise ArtifactError(
                f"{found}; delete this checkpoint, which is the best, and all later ones, and"
                " resume the run."
            )
        load_best()

    trainer._save_checkpoint, trainer._load_best_model = save_whole, load_whole
    trainer._save = _leaves_arguments_out(trainer._save)
    trainer._push_from_checkpoint = _leaves_arguments_out(trainer._push_from_checkpoint)


def check_engine(checkpoint: Path, deepspeed: bool, processes: int) -> None:
    """Check that an engine can resume from a checkpoint.

    Args:
        checkpoint: the folder.
        deepspeed: whether DeepSpeed trains now. All others' checkpoints are alike.
        processes: how many train now.

    Raises:
        ConfigError: DeepSpeed has written it, and does not train now or with as many processes; or
            it trains now, and has not.
    """
    written = (checkpoint / "latest").is_file()
    writers = len(list(checkpoint.glob("rng_state*.pth")))
    if written == deepspeed and not (written and writers != processes):
        return
    how, advice = "without", "leave DeepSpeed out"
    if written:
        how, advice = "by", f"launch it with DeepSpeed and {writers} processes"
    raise ConfigError(
        f"{checkpoint} was written {how} DeepSpeed, whose checkpoints fit its own engine and one"
        f" number of processes; {advice}.",
        where="run",
    )


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train, from a checkpoint on if there is one, to what an uninterrupted training gives.

    From the checkpoint of its last step a trainer would take a step more, and it counts an early
    stopping's patience anew. So that count is restored, and of a training that had come to its end
    the weights are loaded, no more.
    """
    from transformers import EarlyStoppingCallback, TrainerState

    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    # The run may have been given more steps or epochs than its state knows of.
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


def seal(checkpoint: Path, run_id: str | None = None) -> None:
    """Write the manifest of a checkpoint that is whole."""
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
    """Return what is wrong with a checkpoint, naming the first file; None if all are as written.

    Args:
        checkpoint: the folder.
        run_id: of the run whose checkpoint it should be; None: any run's.
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
        return f"{manifest} is of step {found['step']}"
    return next(_changed(checkpoint, found["files"]), None)


def _changed(checkpoint: Path, entries: dict[str, Any]) -> Iterator[str]:
    """Say of each file that is missing or changed that it is."""
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

    The trainer would write into their folders, and count them as good when it deletes old ones.
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
    """Delete the oldest checkpoints beyond ``limit``; the newest and the ``best`` one stay."""
    if not limit or limit < 0:
        return
    found = checkpoints_in(folder)
    kept = {found[-1].name, best.name if best else found[-1].name}
    old = [path for path in found if path.name not in kept]
    for path in old[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def _unusable(checkpoint: Path, run_id: str | None) -> str | None:
    """Return why a run cannot be resumed from a checkpoint."""
    has_optimizer = (checkpoint / "optimizer.pt").is_file() or any(
        path.is_dir() for path in checkpoint.iterdir()
    )
    lack = None if has_optimizer else f"{checkpoint} holds no state of the optimizer"
    return damage(checkpoint, run_id) or lack


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint-N folders, by step."""
    found = (path for path in folder.glob("checkpoint-*") if step_of(path))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return N of a folder named checkpoint-N, or 0."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else 0
