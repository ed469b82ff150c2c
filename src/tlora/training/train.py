"""`tlora train`: initialize, train, evaluate and save; or go on from the last good checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError
from tlora.files import write_json
from tlora.models.pretrained import load_class
from tlora.training.arguments import texts, training_arguments
from tlora.training.digests import inputs_of
from tlora.training.initialize import adapt, save_adapter
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder
from tlora.training.setup import Setup, settle

if TYPE_CHECKING:
    from tlora.methods.base import Plan, Prepared

logger = logging.getLogger(__name__)

# Trainer fields that cannot change the weights; a resumed run may set them anew.
_HARMLESS = ("save_", "logging_", "report_to", "run_name", "disable_tqdm", "log_level", "hub_")

_TIMINGS = ("runtime", "_per_second")


def run(config: RunConfig) -> RunFolder:
    """Train an adapter; return the folder of the run.

    With `config.resume` and a run in the folder, its saved configuration is used and training
    goes on from the last whole checkpoint (from the start, if there is none) to the same weights
    as without the interruption, if the files of rows and the base model are still what they were. A
    finished run is left as it is.

    Raises:
        ConfigError: a field is wrong, the folder is taken, be it by a live process, or what a
            resumed run reads has changed.
        DataError: rows are missing or not what the task expects.
    """
    folder = RunFolder(config.output_dir)
    if config.resume and not folder.exists and not config.model:
        raise ConfigError(
            f"there is no run in {folder.path} to resume; name its folder by --output_dir.", "run"
        )
    with folder.locked():
        if config.resume and folder.finished:
            logger.warning("%s holds a finished run; there is nothing to resume.", folder.path)
        elif config.resume and folder.exists:
            config = merge_saved(config, RunConfig.from_dict(folder.config()))
            inputs = inputs_of(config)
            folder.refuse_changed(inputs)
            _train(config, folder, inputs, folder.saved_plan())
        else:
            folder.refuse_unless_free()
            _train(config, folder, inputs_of(config))
    return folder


def _train(
    config: RunConfig, folder: RunFolder, inputs: dict[str, str], plan: Plan | None = None
) -> None:
    setup = settle(config)
    arguments = training_arguments(setup, folder.checkpoints)
    _check_evaluation(setup, arguments)
    _refuse_sharding(arguments)
    seconds: dict[str, float] = {}
    with timed(seconds, "initialise"):
        prepared = adapt(setup, arguments.device, plan)
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    trainer = make_trainer(setup, prepared, arguments, folder)
    if trainer.is_world_process_zero():
        folder.start(setup.record(), "train", prepared.plan, inputs)
    with timed(seconds, "train"):
        trainer.train(resume_from_checkpoint=_resume_point(folder, trainer))
    if trainer.is_world_process_zero():
        # The trainer may have wrapped or moved the model, but it is this very object. It is saved
        # first: an evaluation that fails must not cost what was trained.
        save_adapter(prepared, setup, folder.adapter)
    with timed(seconds, "evaluate"):
        metrics = scores(trainer, setup.held_out)
    if trainer.is_world_process_zero():
        if metrics:
            write_json(folder.metrics, metrics)
        folder.finish({"trainable_parameters": trainable, "seconds": seconds})


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the body took; of a resumed run that is its last start alone."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


def _check_evaluation(setup: Setup, arguments: Any) -> None:
    if arguments.eval_strategy != "no" and setup.held_out is None:
        raise ConfigError(
            f"`eval_strategy` is {str(arguments.eval_strategy.value)!r}, but there are no"
            " evaluation rows; give --eval_file.",
            where="trainer",
        )


def _refuse_sharding(arguments: Any) -> None:
    """Refuse engines that keep the trained weights in parts: a run saves them whole.

    Raises:
        ConfigError: FSDP or ZeRO-3 is asked for, by a field or by `accelerate launch`.
    """
    fsdp = bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    zero3 = deepspeed is not None and deepspeed.is_zero3()
    if fsdp or zero3 or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise ConfigError(
            f"{'FSDP' if fsdp else 'ZeRO-3'} keeps the weights in parts, which `tlora train` does"
            " not save; launch it with DDP or ZeRO-2, or `tlora init` and train the adapter by"
            " a script of your own (docs/distributed.md).",
            where="trainer",
        )


def merge_saved(config: RunConfig, saved: RunConfig) -> RunConfig:
    """Return the configuration to resume with: the saved one, and what cannot change the weights.

    A field of ``config`` that is at its default counts as not given.

    Raises:
        ConfigError: a field is given that differs from the saved run; all such fields at once.
    """
    given, before, default = (
        _flat(record.to_dict()) for record in (config, saved, RunConfig(output_dir=""))
    )
    faults, kept = [], {}
    for name, value in given.items():
        if name in ("output_dir", "resume") or value in (default.get(name), before.get(name)):
            continue
        section, _, field = name.partition(".")
        if section == "trainer" and field.startswith(_HARMLESS):
            kept[field] = value
        else:
            faults.append(
                f"`{name}` is {value!r}, but the run was started with {before.get(name)!r};"
                " leave it out, or start a new run in another --output_dir."
            )
    if faults:
        raise ConfigError(faults, where="resume")
    return dataclasses.replace(
        saved, resume=True, output_dir=config.output_dir, trainer=saved.trainer | kept
    )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        nested = value if isinstance(value, dict) else None
        flat.update({f"{name}.{k}": v for k, v in nested.items()} if nested else {name: value})
    return flat


def make_trainer(setup: Setup, prepared: Prepared, arguments: Any, folder: RunFolder) -> Any:
    """Make the trainer of the task's kind around the prepared model."""
    from tlora.training.trainers import LogCallback, keep_dtypes, replace_bar

    extra: dict[str, Any] = dict(prepared.trainer_kwargs)
    if prepared.optimizer is not None:
        extra["optimizers"] = (prepared.optimizer(prepared.model, arguments), None)
    if setup.task.kind in ("classification", "regression"):
        extra["compute_metrics"] = lambda prediction: setup.task.metrics(
            prediction.predictions, prediction.label_ids
        )
        extra["preprocess_logits_for_metrics"] = _logits_alone
    elif setup.task.reads_replies and arguments.predict_with_generate:
        extra["compute_metrics"] = lambda prediction: setup.task.reply_metrics(
            texts(setup.tokenizer, prediction.predictions),
            texts(setup.tokenizer, prediction.label_ids),
        )
    # Packed rows need TRL's own collator, which lays them end to end.
    if not (getattr(arguments, "packing", False) or getattr(arguments, "padding_free", False)):
        extra["data_collator"] = setup.collator
    trainer = load_class(setup.kind.trainer)(
        model=prepared.model,
        args=arguments,
        train_dataset=setup.train,
        eval_dataset=setup.held_out,
        processing_class=setup.tokenizer,
        callbacks=[LogCallback(folder), *prepared.callbacks],
        **extra,
    )
    replace_bar(trainer)
    keep_dtypes(trainer)
    return trainer


def _logits_alone(outputs: Any, labels: Any) -> Any:
    """Return the logits of what a classifier puts out; encoder-decoders add encoder states."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _resume_point(folder: RunFolder, trainer: Any) -> str | None:
    """Return the checkpoint to go on from; the first process clears away what lies beyond it."""
    from tlora.calibration.group import process_group

    point = _rewound(folder) if trainer.is_world_process_zero() else None
    return process_group().broadcast(point, 0)


def _rewound(folder: RunFolder) -> str | None:
    checkpoint = folder.last_checkpoint()
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    for broken in folder.drop_checkpoints_after(step):
        logger.warning("%s was half-written when the run stopped; it is passed over.", broken)
    folder.rewind_log(step)
    return str(checkpoint) if checkpoint else None


def scores(trainer: Any, rows: Any) -> dict[str, Any]:
    """Return the trainer's scores of ``rows``, {} where there are none.

    The trainer's timings are left out: the same weights and rows give the same scores.
    """
    if rows is None:
        return {}
    found = {k.removeprefix("eval_"): v for k, v in trainer.evaluate(rows).items()}
    return {name: value for name, value in found.items() if not name.endswith(_TIMINGS)}
