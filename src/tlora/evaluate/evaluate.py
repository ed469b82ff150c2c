"""`tlora eval`: evaluate models on tasks with the same prompts, in one table.

Arguments become models (`inference.evaluated_models`) and tasks, both checked before anything is
loaded or written. Each model is loaded in turn and evaluated on every task missing in the folder.
Each finished pair of model and task is written at once.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from tlora.errors import ConfigError
from tlora.evaluate import evaluated_models, loading, preflight, run_format
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder, unnegated
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.grade import grade
from tlora.models.pretrained import Pretrained
from tlora.registry import CONVERSATIONS
from tlora.training.digests import input_digest
from tlora.training.runfolder import provenance

if TYPE_CHECKING:
    from tlora.evaluate.harness_task import TaskResult

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]

_BY_MODEL = ("scores", "samples", "seconds", "truncated")
"""Fields of a task in eval.json that have one entry per model."""


class EvaluationTask(Protocol):
    """Interface of an evaluation task."""

    items: int
    """Number of items."""
    shots: int
    """Few-shot examples per item."""
    protocol: str
    """One line with the task's name and source."""

    def check(self, evaluated: EvaluatedModel, tokenizer: Any, longest: int) -> None:
        """Raise a ConfigError if the model does not support the task."""

    def evaluate(self, lm: Any) -> TaskResult:
        """Evaluate one model on all items."""


def run(config: EvalConfig, tell: Tell = lambda text: None) -> EvalFolder:
    """Evaluate the pairs missing in the folder; finished pairs are skipped.

    Args:
        config: the evaluation.
        tell: called with a line of text for each finished pair of model and task.

    Raises:
        ConfigError: a field is invalid, a model or a task is missing, the folder is in use or
            has other settings, or the judge's endpoint rejects the request.
        DataError: the rows of a task are missing or invalid.
        AdapterError: an adapter does not fit its base.
        JudgeError: some conversations could not be graded; the rest of the result is kept.
        KeyboardInterrupt: stopped; finished pairs are kept.
    """
    folder = EvalFolder(config.output_dir)
    sketched = preflight.check(config)
    if config.only_grades:
        folder.read()  # the lock would create a missing folder
        with folder.locked():
            grade(folder, config, {}, tell)
        return folder
    if sketched:
        config = run_format.settled(config, sketched)
        EvaluationRecord(folder, config, sketched)  # rejects other settings
    models = evaluated_models.resolve(config)
    config = run_format.settled(config, models)
    loading.check_backend(config, models)
    EvaluationRecord(folder, config, models)
    tasks = make_tasks(config, models)
    check(tasks, config, models)
    with folder.locked(), folder.undone_unless_finished():
        record = EvaluationRecord(folder, config, models)
        record.start(tasks)
        try:
            for evaluated in models:
                missing = {n: task for n, task in tasks.items() if not record.has(evaluated, n)}
                if missing:
                    _evaluate(evaluated, missing, record, tell)
            grade(folder, config, {name: task.protocol for name, task in tasks.items()}, tell)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "interrupted; rerun the same command to resume, finished pairs of model and task"
                " are skipped."
            ) from None
    return folder


def make_tasks(config: EvalConfig, models: list[EvaluatedModel]) -> dict[str, EvaluationTask]:
    """Return the tasks by name, with all rows read.

    Raises:
        ConfigError, DataError: as `run`.
    """
    if all(evaluated.head == "labeled" for evaluated in models):
        from tlora.evaluate import labeled

        return dict(labeled.make(config, models))
    from tlora.evaluate.harness_task import HarnessTask
    from tlora.evaluate.written_rows import WrittenRows
    from tlora.evaluations import catalog

    if preflight.of_a_task(config):
        tokenizer = run_format.template_tokenizer(models[0], config, models)
        return {config.tasks[0]: WrittenRows(config, tokenizer)}
    chats = [name for name in config.tasks if name in CONVERSATIONS.names()]
    settings = catalog.Settings(
        allow_code_execution=config.allow_code_execution,
        protection=config.sandbox,
        samples=config.n_samples,
        trust_remote_code=config.trust_remote_code,
    )
    others = [name for name in config.tasks if name not in chats]
    built = catalog.build(others, config.data_dir, settings)
    tasks: dict[str, EvaluationTask] = {
        name: HarnessTask(task, config) for name, task in built.items()
    }
    return tasks | {name: CONVERSATIONS.load(name)(name, config) for name in chats}


def check(
    tasks: dict[str, EvaluationTask], config: EvalConfig, models: list[EvaluatedModel]
) -> None:
    """Check from the configurations alone that every model supports every task.

    Raises:
        ConfigError: as `run`.
    """
    from lm_eval.models.utils import resolve_max_length

    if config.laplace:
        _check_laplace(tasks, models)
    for evaluated in models:
        tokenizer = run_format.template_tokenizer(evaluated, config, models)
        own = Pretrained(name=evaluated.model, trust_remote_code=config.trust_remote_code).config()
        longest = config.max_length or resolve_max_length(own, tokenizer)
        for task in tasks.values():
            task.check(evaluated, tokenizer, longest)


def _check_laplace(tasks: dict[str, EvaluationTask], models: list[EvaluatedModel]) -> None:
    """Check that tasks and models support a Laplace approximation."""
    faults = [
        f"`laplace` does not support {name}, which needs classes, or choices by likelihood with"
        " training rows; remove --laplace."
        for name, task in tasks.items()
        if not getattr(task, "has_odds", False)
    ]
    faults += [
        f"`laplace` only supports multiple choice for causal models, but {each.name} is an"
        " encoder-decoder; remove --laplace."
        for each in models
        if each.head == "seq2seq"
    ]
    if faults:
        raise ConfigError(faults, where="laplace")


def _evaluate(
    evaluated: EvaluatedModel,
    tasks: dict[str, EvaluationTask],
    record: EvaluationRecord,
    tell: Tell,
) -> None:
    """Load one model, evaluate it on the tasks, and release it."""
    lm = _model(evaluated, record, tasks)
    for name, task in tasks.items():
        start = time.perf_counter()
        found = task.evaluate(lm)
        seconds = time.perf_counter() - start
        record.add(evaluated, name, found, seconds)
        if found.truncated:
            logger.warning(
                "%s: truncated %d prompts of %s that exceed the model's context length.",
                evaluated.name,
                found.truncated,
                name,
            )
        scores = unnegated(found.scores).items()
        main = next((f"{key} {value:.4f}" for key, value in scores), "answered")
        tell(f"{evaluated.name}: {name}: {main} ({seconds:.0f} s)")
    del lm
    loading.release()


def _model(
    evaluated: EvaluatedModel, record: EvaluationRecord, tasks: dict[str, EvaluationTask]
) -> Any:
    config = record.config
    tokenizer = run_format.template_tokenizer(evaluated, config, record.evaluated)
    if evaluated.head == "labeled":
        from tlora.evaluate.labeled import Labeler, Labels

        head = next(task.head for task in tasks.values() if isinstance(task, Labels))
        model = loading.load(evaluated, config, **head)
        return Labeler(evaluated, model, tokenizer)
    if config.backend == "vllm":
        from tlora.evaluate.vllm import ServedLM

        lm = ServedLM(evaluated, config)
        lm.tokenizer.chat_template = tokenizer.chat_template
        return lm
    if evaluated.kind == "laplace":
        from tlora.evaluate.choices import LaplaceLM

        return LaplaceLM(loading.load(evaluated, config), tokenizer, config, evaluated)
    from tlora.evaluate.lm import TransformersLM

    return TransformersLM(loading.load(evaluated, config), tokenizer, config, evaluated.head)


class EvaluationRecord:
    """eval.json as it grows.

    Results in the folder for other models and tasks with the same settings are kept.
    """

    def __init__(
        self, folder: EvalFolder, config: EvalConfig, models: list[EvaluatedModel]
    ) -> None:
        """Read existing results.

        Raises:
            ConfigError: they have other settings, or another model has the same name.
        """
        self.config, self.evaluated = config, models
        self._folder = folder
        self._identities = {evaluated.name: evaluated.identity() for evaluated in models}
        found = folder.read() if folder.exists else {}
        self._models: dict[str, Any] = {each["name"]: each for each in found.get("models", [])}
        self._tasks: dict[str, Any] = {each["name"]: each for each in found.get("tasks", [])}
        self._starts: list[Any] = found.get("starts", [])
        files = {"test_file": config.test_file, "data.chat_template": config.data.chat_template}
        self._inputs = {name: input_digest(path) for name, path in files.items()}
        self._refuse_mixing(found)

    def _refuse_mixing(self, found: dict[str, Any]) -> None:
        faults = []
        before = found.get("config", {})
        finished = any(task.get("scores") for task in self._tasks.values())
        for name, value in self.config.settings().items():
            if finished and before.get(name) != value:
                faults.append(
                    f"`{name}` is {value!r}, but {self._folder.path} was made with"
                    f" {before.get(name)!r}; use the same value, or another --output_dir."
                )
        for name, digest in self._inputs.items():
            # A file's content may have changed under the same name.
            if finished and not faults and found["inputs"].get(name) != digest:
                faults.append(
                    f"the file of `{name}` has changed since {self._folder.path} was made; restore"
                    " it, or use another --output_dir."
                )
        for evaluated in self.evaluated:
            known = self._models.get(evaluated.name, {})
            here = (evaluated.kind, evaluated.model, evaluated.adapter)
            if known and (known["kind"], known["model"], known["adapter"]) != here:
                faults.append(
                    f"{self._folder.path} has another model called {evaluated.name!r}; rename this"
                    f" one: NAME={evaluated.path}."
                )
        if faults:
            raise ConfigError(faults, where="eval")

    def start(self, tasks: dict[str, EvaluationTask]) -> None:
        """Record the pairs about to run; drop results of models that have changed."""
        for evaluated in self.evaluated:
            identity = self._identities[evaluated.name]
            known = self._models.get(evaluated.name)
            if known and known["identity"] != identity:
                logger.warning("%s has changed; evaluating it again.", evaluated.name)
                self._forget(evaluated.name)
        named = {evaluated.name: self._entry(evaluated) for evaluated in self.evaluated}
        first = self.evaluated[0]
        # Existing models keep their place, but the base comes first as the baseline.
        lead = {first.name: named[first.name]} if first.kind == "base" else {}
        self._models = lead | {k: v for k, v in (self._models | named).items() if k not in lead}
        for name, task in tasks.items():
            self._tasks.setdefault(name, {"name": name, "metrics": []})
            self._tasks[name] |= {
                "protocol": task.protocol,
                "items": task.items,
                "shots": task.shots,
            }
            for field in _BY_MODEL:
                self._tasks[name].setdefault(field, {})
        start = provenance(seed=self.config.seed, output=self._folder.path)
        start["packages"]["lm_eval"] = importlib.metadata.version("lm_eval")
        self._starts.append(start)
        self._write()

    def has(self, evaluated: EvaluatedModel, task: str) -> bool:
        """Return whether a pair is finished."""
        there = evaluated.name in self._tasks[task]["scores"]
        return there and self._folder.samples_file(evaluated.name, task).is_file()

    def add(self, evaluated: EvaluatedModel, task: str, found: TaskResult, seconds: float) -> None:
        """Write a finished pair."""
        entry = self._tasks[task]
        digest = self._folder.write_samples(evaluated.name, task, found.lines)
        entry["samples"][evaluated.name] = digest
        entry["metrics"] = entry["metrics"] or list(found.scores)
        entry["scores"][evaluated.name] = found.scores
        entry["seconds"][evaluated.name] = round(seconds, 3)
        entry["truncated"][evaluated.name] = found.truncated
        self._write()

    def _entry(self, evaluated: EvaluatedModel) -> dict[str, Any]:
        return {
            "name": evaluated.name,
            "kind": evaluated.kind,
            "model": evaluated.model,
            "adapter": evaluated.adapter,
            "identity": self._identities[evaluated.name],
        }

    def _forget(self, model: str) -> None:
        for entry in self._tasks.values():
            for field in _BY_MODEL:
                entry[field].pop(model, None)

    def _write(self) -> None:
        self._folder.write(
            {
                "config": self.config.to_dict(),
                "inputs": self._inputs,
                "provenance": self._starts[-1],
                "starts": self._starts,
                "models": list(self._models.values()),
                "tasks": list(self._tasks.values()),
            }
        )
