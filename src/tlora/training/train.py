"""`tlora train`: initialize, train, evaluate and save; or resume from the last good checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, TLoraError, first_line
from tlora.files import write_json
from tlora.methods.lorarite import OPTIM
from tlora.models.pretrained import load_class
from tlora.training import model_card, preflight
from tlora.training.arguments import texts, training_arguments
from tlora.training.checkpoints import check_engine, guard_checkpoints, rewind, train_from
from tlora.training.continuing import with_adapter
from tlora.training.initialize import adapt, keep_budget, save_adapter, warn
from tlora.training.learningrate import with_learning_rate
from tlora.training.peak_memory import PeakMemory
from tlora.training.resume import Todo, continued
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder, process_count
from tlora.training.setup import Setup, settle

if TYPE_CHECKING:
    from tlora.methods.base import Prepared

logger = logging.getLogger(__name__)

_NO_SCORES = ("runtime", "_per_second", "_preparation_time", "num_tokens")


def run(config: RunConfig) -> RunFolder:
    """Train an adapter; return the folder of the run.

    If the folder holds this run, unfinished, training resumes from the last complete checkpoint (or
    the start) and reaches the same weights as an uninterrupted run. A finished run does not change.
    With `config.resume` a run must exist, and fields at their defaults are taken from it.

    Raises:
        ConfigError: a field is wrong, another process or other files occupy the folder, or its run
            was started with another configuration, other rows or another base model.
        DataError: rows are missing or not what the task expects.
        DivergenceError: the training diverged; the run is not finished and has no adapter.
    """
    config = with_adapter(config)
    folder = RunFolder(config.output_dir)
    with folder.locked():
        todo = continued(config, folder, "train")
        if todo is not None:
            _train(todo, folder)
    return folder


def _train(todo: Todo, folder: RunFolder) -> None:
    preflight.check_evaluation(todo.config)
    setup = with_learning_rate(settle(todo.config))
    if todo.resumes:
        keep_budget(setup, folder)
    from tlora.training import gathering, screen, sharded  # import transformers

    arguments = training_arguments(setup, folder.checkpoints)
    adapt_parts = sharded.engine_of(arguments)
    _refuse_disagreement(todo.resumes, folder)
    seconds: dict[str, float] = {}
    memory = PeakMemory(arguments.device)
    with timed(seconds, "initialise"):
        plan = folder.saved_plan() if todo.resumes else None
        prepared = (adapt_parts or adapt)(setup, arguments.device, plan)
    if plan is None and arguments.process_index == 0:
        warn(setup, prepared.plan)
    logger.info("%s", screen.trained_parameters(prepared.model))
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    trainer = make_trainer(setup, prepared, arguments, folder)
    screen.show(trainer, memory)
    with folder.undone_unless(lambda: trainer.state.global_step > 0):
        if trainer.is_world_process_zero():
            if folder.exists and not todo.resumes:
                folder.clear()
            folder.start(setup.record(), "train", prepared.plan, todo.inputs, setup.settled)
        with timed(seconds, "train"):
            train_from(trainer, _resume_point(folder, trainer, todo.resumes))
    _name_best(trainer)
    if adapt_parts:
        gathering.gather(prepared)
    if trainer.is_world_process_zero():
        # The trainer may have wrapped or moved the model, but it is the same object. It is saved
        # first: a failed evaluation must not lose the training.
        save_adapter(prepared, setup, folder.adapter)
    with timed(seconds, "evaluate"):
        metrics = scores(trainer, setup.held_out)
    _refuse_diverged(metrics, trainer, folder)
    if trainer.is_world_process_zero():
        if metrics:
            write_json(folder.metrics, metrics)
            model_card.write(folder.adapter, setup, metrics)
        measured = {"trainable_parameters": trainable, "seconds": seconds}
        rows = {} if setup.held_out is None else {"held_out_rows": len(setup.held_out)}
        folder.finish(measured | rows)


def _name_best(trainer: Any) -> None:
    """Log which checkpoint was loaded at the end, if the best one was."""
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best:
        name = str(trainer.args.metric_for_best_model).removeprefix("eval_")
        value = trainer.state.best_metric
        logger.info(
            "kept the best checkpoint, %s: evaluation %s %.4g.", Path(best).name, name, value
        )


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record the duration of the body; for a resumed run, of its last start only."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


def optimizer_of(setup: Setup, prepared: Prepared) -> Any | None:
    """Return a function that makes the run's optimizer if transformers has none for it; else None.

    Raises:
        ConfigError: the method has its own optimizer, and `optim` names another.
    """
    if setup.config.trainer.get("optim") != OPTIM:
        return prepared.optimizer
    if prepared.optimizer is not None:
        raise ConfigError(
            f"`optim` {OPTIM!r} would replace the optimizer of the method "
            f"{setup.config.method!r}; choose another optimizer.",
            where="trainer",
        )
    from tlora.adapter.rite import make_rite

    return make_rite


def make_trainer(setup: Setup, prepared: Prepared, arguments: Any, folder: RunFolder) -> Any:
    """Make the trainer for the task's kind around the prepared model.

    Raises:
        ConfigError: the trainer refuses its arguments for this model; its message says why.
    """
    from tlora.calibration.placement import is_sharded
    from tlora.training.divergence import DivergenceCallback
    from tlora.training.gathering import fit_trainer
    from tlora.training.trainers import LogCallback, keep_dtypes, score_labels_alone, stopping

    extra: dict[str, Any] = dict(prepared.trainer_kwargs)
    if (make := optimizer_of(setup, prepared)) is not None:
        extra["optimizers"] = (make(prepared.model, arguments), None)
    if setup.task.kind in ("classification", "regression"):
        extra["compute_metrics"] = lambda prediction: setup.task.metrics(
            prediction.predictions, prediction.label_ids
        )
        extra["preprocess_logits_for_metrics"] = _only_logits
    elif setup.task.reads_replies and arguments.predict_with_generate:
        extra["compute_metrics"] = lambda prediction: setup.task.reply_metrics(
            texts(setup.tokenizer, prediction.predictions),
            texts(setup.tokenizer, prediction.label_ids),
        )
    # Packed rows need TRL's own collator, which concatenates them.
    if not (getattr(arguments, "packing", False) or getattr(arguments, "padding_free", False)):
        extra["data_collator"] = setup.collator
    if setup.task.kind == "causal":
        score_labels_alone()
    try:
        trainer = load_class(setup.kind.trainer)(
            model=prepared.model,
            args=arguments,
            train_dataset=setup.train,
            eval_dataset=setup.held_out,
            processing_class=setup.tokenizer,
            callbacks=[LogCallback(folder), *stopping(setup.config), *prepared.callbacks],
            **extra,
        )
    except (ValueError, ImportError) as error:
        if isinstance(error, TLoraError):
            raise
        raise ConfigError(first_line(error), where="trainer") from error
    if is_sharded(prepared.model):
        fit_trainer(trainer)
    keep_dtypes(trainer)
    guard_checkpoints(trainer, folder.run_id)
    DivergenceCallback().watch(trainer)
    return trainer


def _only_logits(outputs: Any, labels: Any) -> Any:
    """Return only the logits from a classifier's output; encoder-decoders add encoder states."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _refuse_disagreement(started: bool, folder: RunFolder) -> None:
    """Check that all processes of a launch found a run, or none did: only the first writes it."""
    from tlora.calibration.group import process_group

    if len(set(process_group().all_gather(started))) > 1:
        raise ConfigError(
            f"{folder.path} holds a run on some machines of the launch and not on "
            "others; put --output_dir on a shared file system.",
            where="output_dir",
        )


def _resume_point(folder: RunFolder, trainer: Any, started: bool) -> Path | None:
    """Return the checkpoint to resume from; the first process removes later ones."""
    from tlora.calibration.group import process_group

    point = _rewound(folder, started) if trainer.is_world_process_zero() else None
    point = process_group().broadcast(point, 0)
    if point is not None:
        check_engine(point, trainer.is_deepspeed_enabled, process_count())
    return point


def _rewound(folder: RunFolder, started: bool) -> Path | None:
    checkpoint = rewind(folder.checkpoints, folder.run_id())
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    folder.rewind_log(step)
    if checkpoint:
        logger.info("Resuming %s at step %d.", folder.path, step)
    elif started:
        logger.info("the run in %s starts over: it has no whole checkpoint.", folder.path)
    return checkpoint


def _refuse_diverged(metrics: dict[str, Any], trainer: Any, folder: RunFolder) -> None:
    """Check the loss of the evaluation, and remove the adapter if the loss is not finite.

    No training loss covers the last step's weights: finite weights can still give a bad loss.

    Raises:
        DivergenceError: it is not finite.
    """
    from tlora.training.divergence import diverged

    if math.isfinite(metrics.get("loss", 0.0)):
        return
    if trainer.is_world_process_zero():
        shutil.rmtree(folder.adapter)
    step = trainer.state.global_step
    raise diverged(
        f"by step {step}, the last: the loss on the evaluation rows is not finite",
        trainer.args,
        step,
    )


def scores(trainer: Any, rows: Any) -> dict[str, Any]:
    """Return the trainer's scores of ``rows``, {} if there are none.

    The trainer's timings are dropped, and so is TRL's token count, which restarts on resuming: the
    same weights and rows give the same scores.
    """
    if rows is None:
        return {}
    found = {k.removeprefix("eval_"): v for k, v in trainer.evaluate(rows).items()}
    return {name: value for name, value in found.items() if not name.endswith(_NO_SCORES)}
