"""`tlora compare`: methods x learning rates x seeds on one task with the same protocol.

The configuration is checked and the rows are read once, before anything is written. The tuning runs
of each method choose its learning rate on the validation rows; its final runs use other seeds at
that learning rate and are scored on the test rows. Each run is a process (`tlora.compare.queue`)
that writes one JSON file (`tlora.compare.onerun`); resuming skips runs with a file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlora import extras
from tlora.compare.compareconfig import EXACT_MATCH, CompareConfig, MethodEntry
from tlora.compare.comparefolder import RUN_HEADER, CompareFolder
from tlora.compare.exactmatch import check_rows
from tlora.compare.experiment import experiment
from tlora.compare.firsttry import best_elsewhere
from tlora.compare.onerun import portable
from tlora.compare.queue import Job, Outcome, Workers, cores, termination_interrupts
from tlora.compare.trials import SCORED, Comparison, Schedule, Trial, digest
from tlora.errors import ConfigError, Faults, did_you_mean
from tlora.tasks.base import LONGEST
from tlora.training import preflight as training_preflight
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import provenance

if TYPE_CHECKING:
    from tlora.compare.onray import RayWorkers
    from tlora.training.setup import Setup

Tell = Callable[[str], None]

RUN = "tlora.compare.onerun:run"
PRELOAD: tuple[str, ...] = (
    "datasets",
    "peft",
    "scipy.stats",
    "sklearn.metrics",
    "torch",
    "transformers",
    "trl",
)
PRELOAD += ("tlora.adapter.attach", "tlora.compare.onerun", "tlora.training.train")
"""Modules that the fork server imports once for all runs; they start no thread."""
_CAUSAL_SCORES = ("loss", EXACT_MATCH)
_LOWER = ("loss", "mse")


@dataclass(frozen=True)
class Progress:
    """Progress of a comparison when `run` returns."""

    finished: int
    """Number of finished runs."""
    total: int
    """Number of all runs known so far."""
    failed: list[str]
    """Runs that failed in this call, with name and cause."""


def run(config: CompareConfig, tell: Tell = lambda text: None) -> Progress:
    """Run everything that is missing; finished runs are skipped.

    Args:
        config: the comparison.
        tell: called with a line of text when a run starts and when it ends.

    Raises:
        ConfigError: a field is invalid, or the folder is in use.
        DataError: rows are missing or do not fit the task.
        KeyboardInterrupt: stopped by a signal; all run processes have ended.
    """
    setup = check(config)
    comparison = identify(config, setup)
    crew = workers(config, tell)
    folder = CompareFolder(config.output_dir)
    with folder.locked():
        folder.start(
            {
                "config": portable(config),
                "defaults": {entry.name: entry.changed_defaults() for entry in config.entries()},
                "shared": experiment(config),
                "experiment": comparison.experiment,
                "metric": comparison.metric,
                "better": comparison.better,
                "first_try": comparison.first_try,
                "provenance": provenance(seed=None, output=config.output_dir),
            }
        )
        shutil.rmtree(folder.work, ignore_errors=True)
        return work(Schedule(comparison, folder), crew, tell, setup.left_out)


def preflight(config: CompareConfig) -> None:
    """Check flags and files before any slow import.

    Raises:
        ConfigError, DataError: as in `run`.
    """
    faults = Faults("compare")
    with faults:
        CompareFolder(config.output_dir).refuse_unless_free()
    with faults:
        if config.engine == "ray":
            extras.require("ray", where="engine")
    run_config = _first_run(config)
    with faults:
        best_elsewhere(config)
    with faults:
        training_preflight.check(run_config, _validation_file(config))
    for entry in config.entries()[1:]:
        with faults:
            training_preflight.check_optimizer(_run_config(config, entry))
    with faults:
        task = training_preflight.task_of(run_config)
        with faults:
            if not task.evaluates(run_config.train_file, run_config.eval_file):
                raise ConfigError("there are no test rows; give --test_file.", where="test_file")
        with faults:
            if task.kind == "causal" and not task.reads_replies:
                _metric(config, _CAUSAL_SCORES)
    faults.raise_found()


def check(config: CompareConfig) -> Setup:
    """Check everything possible before the first run; return the setup of the first method.

    Raises:
        ConfigError, DataError: as in `run`.
    """
    preflight(config)
    from tlora.compare.onerun import split
    from tlora.training.arguments import training_arguments
    from tlora.training.setup import settle_checked

    setup = settle_checked(_first_run(config), _validation_file(config))
    training_arguments(setup, CompareFolder(config.output_dir).work)
    _check_entries(config, setup)
    _, held = split(setup, config.validation, config.validation_seed)
    scored = {"test": setup.held_out} if config.answers else {}
    if config.writes_answers:
        scored = {"validation": held, "test": setup.held_out}
    if setup.task.kind == "causal":
        for name, rows in scored.items():
            check_rows(rows, name, setup.tokenizer, setup.task.data.max_length or LONGEST)
    elif config.answers:
        raise ConfigError(
            f"`answers` only applies to causal tasks, but {config.task} is a {setup.task.kind}"
            " task; remove it.",
            where="compare",
        )
    return setup


def _first_run(config: CompareConfig) -> RunConfig:
    return _run_config(config, config.entries()[0])


def _run_config(config: CompareConfig, entry: MethodEntry) -> RunConfig:
    return config.run_config(entry, entry.learning_rates[0], config.final_seeds[0])


def _validation_file(config: CompareConfig) -> str | None:
    return config.validation if isinstance(config.validation, str) else None


def _check_entries(config: CompareConfig, setup: Setup) -> None:
    """Check every method's options against the task and the model, without reading weights.

    Raises:
        ConfigError: a task type is wrong, or names match nothing; one error lists all faults.
    """
    from tlora.training.dryrun import on_meta
    from tlora.training.initialize import check_targets
    from tlora.training.kinds import with_task_type

    model, _ = on_meta(setup.config, setup.kind, setup.task.label_names)
    faults = []
    for entry in config.entries():
        try:
            options = with_task_type(setup.kind, entry.options())
            check_targets(setup.kind, options, model)
        except ConfigError as error:
            faults += [f"{entry.label}: {wrong}" for wrong in error.faults]
    if faults:
        raise ConfigError(faults, where="methods")


def identify(config: CompareConfig, setup: Setup) -> Comparison:
    """Return the comparison with its metric and the digest of its runs' shared settings.

    Raises:
        ConfigError: `metric` is not a score of the task.
    """
    metric = _metric(config, score_names(setup))
    better = config.better or ("lower" if metric in _LOWER else "higher")
    rates = best_elsewhere(config)
    return Comparison(config, metric, better, digest(experiment(config)), first_try=rates)


def _metric(config: CompareConfig, known: Sequence[str]) -> str:
    """Return the metric for the comparison, one of ``known``."""
    metric = (config.metric or known[0]).removeprefix("eval_")
    if metric not in known:
        names = ", ".join(map(repr, known))
        raise ConfigError(
            f"`metric` is {config.metric!r}, but the scores are {names}."
            f"{did_you_mean(metric, known)}",
            where="compare",
        )
    return metric


def score_names(setup: Setup) -> list[str]:
    """Return the names of an evaluation's scores, the task's own first."""
    import numpy as np

    from tlora.training.arguments import reply_scores

    task, own = setup.task, []
    if task.kind == "classification":
        count = max(2, len(task.label_names or ()))
        own = list(task.metrics(np.eye(count), np.arange(count)))
    elif task.kind == "regression":
        own = list(task.metrics(np.arange(3.0).reshape(3, 1), np.arange(3.0)))
    elif task.reads_replies:
        own = list(reply_scores(setup))
    elif task.kind == "causal":
        return [*_CAUSAL_SCORES]
    return [*own, "loss"]


def workers(config: CompareConfig, tell: Tell) -> Workers | RayWorkers:
    """Return the workers for the runs, on this machine or on a Ray cluster.

    Raises:
        ConfigError: the cluster cannot be used.
    """
    if config.engine == "ray":
        from tlora.compare.onray import connect

        threads = config.threads or config.cpus_per_run or 1
        return connect(config, Workers(RUN, threads=threads, preload=(*PRELOAD, "ray")), tell)
    return Workers(
        function=RUN,
        jobs=config.jobs,
        threads=config.threads or max(1, cores() // config.jobs),
        preload=PRELOAD,
        gpus=visible_gpus(),
    )


def visible_gpus() -> list[str]:
    """Return the CUDA_VISIBLE_DEVICES value that selects each visible GPU."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(index) for index in range(count)]


def work(
    schedule: Schedule,
    workers: Workers | RayWorkers,
    tell: Tell,
    left_out: Sequence[int] = (),
) -> Progress:
    """Run the ready trials of ``schedule``; training rows ``left_out`` repeat evaluation prompts.

    Raises:
        KeyboardInterrupt: stopped by a signal; all run processes have ended.
    """
    folder = schedule.folder
    trials: dict[str, Trial] = {}
    places: dict[str, int] = {}
    failed: list[str] = []
    before, _ = schedule.counts()

    def report(trial: Trial, event: str) -> None:
        _, total = schedule.counts()
        run = f"{trial.entry.label}, learning rate {trial.learning_rate:g}, seed {trial.seed}"
        tell(f"run {places[trial.name]} of {total} ({trial.phase}), {run}: {event}")

    def ready() -> Job | None:
        trial = schedule.next()
        if trial is None:
            return None
        trials[trial.name] = trial
        places[trial.name] = before + len(trials)
        report(trial, workers.begins)
        return _job(trial, schedule.comparison, folder, workers.threads, left_out)

    def settled(job: Job, outcome: Outcome) -> None:
        trial = trials[job.name]
        # A run writes its record last; later failures are library shutdown errors.
        if folder.record(job.name) is None:
            failed.append(f"{job.name}: {_note_failure(trial, schedule, outcome)}")
        else:
            job.log.unlink(missing_ok=True)
        report(trial, f"{_result(trial, schedule, outcome)}, after {outcome.seconds:.0f} s")

    try:
        with termination_interrupts():
            workers.work(ready, settled)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; rerun the same command to resume, finished runs are skipped."
        ) from None
    finally:
        shutil.rmtree(folder.work, ignore_errors=True)
    return Progress(*schedule.counts(), failed)


def _job(
    trial: Trial,
    comparison: Comparison,
    folder: CompareFolder,
    threads: int,
    left_out: Sequence[int],
) -> Job:
    config = comparison.config
    run = config.run_config(trial.entry, trial.learning_rate, trial.seed)
    final = trial.phase == "final"
    keep = config.keep_adapters and final
    work = str(folder.work / trial.name)
    payload = {
        "record": RUN_HEADER | trial.record() | {"config": portable(run.resolved())},
        "config": run.to_dict() | {"output_dir": work},
        "validation": config.validation,
        "validation_seed": config.validation_seed,
        "left_out": list(left_out),
        "exact_match": config.writes_answers or (config.answers and final),
        "threads": threads,
        "file": str(folder.record_file(trial.name)),
        "work": work,
        "adapter": str(folder.adapters / trial.name) if keep else None,
    }
    return Job(trial.name, payload, folder.logs / f"{trial.name}.log")


def _note_failure(trial: Trial, schedule: Schedule, outcome: Outcome) -> str:
    """Write the record of a failed run; return its cause in a line."""
    config = schedule.comparison.config
    lines = outcome.last_lines
    run = config.run_config(trial.entry, trial.learning_rate, trial.seed)
    record = trial.record() | {
        "status": "failed",
        "error": {"cause": outcome.cause, "last_lines": lines},
        "seconds": {"total": round(outcome.seconds, 3)},
        "config": portable(run),
        "provenance": provenance(trial.seed, output=schedule.folder.path),
    }
    schedule.folder.write_record(trial.name, record)
    return f"{outcome.cause}: {lines[-1]}" if lines else outcome.cause


def _result(trial: Trial, schedule: Schedule, outcome: Outcome) -> str:
    """Return the result of a run that ended: its score, and its loss if the score is another."""
    comparison = schedule.comparison
    record = schedule.folder.record(trial.name)
    score = comparison.score(record)
    if record is None or record["status"] != "finished":
        return f"failed, {outcome.cause}"
    if record.get("diverged") is not None:
        return f"diverged at step {record['diverged']}"
    if score is None:
        return "finished without a score"
    rows = SCORED[trial.phase]
    scores = {comparison.metric: score} | {"loss": record["scores"][rows].get("loss")}
    said = (f"{rows} {name} {value:.4f}" for name, value in scores.items() if value is not None)
    return f"finished, {', '.join(said)}"
