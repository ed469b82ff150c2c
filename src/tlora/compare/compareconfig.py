"""Configuration of `tlora compare`: methods x learning rates x seeds on one task.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tlora.checks import FOLDER, SEED, Rule, Section, at_least, default_of
from tlora.compare import defaults as comparedefaults
from tlora.errors import ConfigError, unknown_names
from tlora.registry import METHODS
from tlora.training.runconfig import CalibrationConfig, RunConfig, SharedConfig

Better = Literal["higher", "lower"]
Engine = Literal["local", "ray"]

Rates = Annotated[
    list[float],
    Rule("positive numbers, each once", lambda v: all(rate > 0 for rate in v) and _distinct(v)),
]
Seeds = Annotated[
    list[int],
    Rule(
        "whole numbers from 0 to 2**32 - 1, each once",
        lambda v: v and all(map(SEED.holds, v)) and _distinct(v),
    ),
]
Validation = Annotated[
    float | str,
    Rule(
        "a file, a fraction below 1 or a number of rows",
        lambda v: _names_a_file(v) if isinstance(v, str) else 0 < v < 1 or (v >= 1 and v % 1 == 0),
    ),
]


def _names_a_file(text: str) -> bool:
    """Whether a text is not a number: `-1` and `nan` are mistyped numbers, not files."""
    try:
        float(text)
    except ValueError:
        return True
    return False


def _distinct(values: list[Any]) -> bool:
    return len(set(values)) == len(values)


EXACT_MATCH = "exact_match"
"""The metric that needs generated answers; all others use predictions."""

_UNEQUAL = {
    "learning_rate": "set `learning_rates` instead, because the comparison tunes it",
    "auto_find_batch_size": "the batch size would depend on a method's memory use",
    "lr_scheduler_type": "it depends on a run's scores; choose one that is the same for all runs",
    "load_best_model_at_end": "the comparison uses the final weights after equal steps",
    "save_strategy": "the runs of a comparison write no checkpoints; see `keep_adapters`",
}


@dataclass(kw_only=True)
class MethodEntry(Section):
    """One method of a comparison: an item of `methods`."""

    name: str = ""
    """Name of the method; see `tlora list methods`."""
    label: str = ""
    """Its name in tables; by default, the method's name."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of this method, which override the common ones."""
    learning_rates: Rates = field(default_factory=list)
    """Its learning rates, if they differ from the common ones."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Its calibration fields, which override the common ones."""

    @classmethod
    def of(cls, item: Any) -> MethodEntry:
        """Parse an item of `methods`.

        Raises:
            ConfigError: it is neither a name nor a mapping, or has an unknown name.
        """
        if not isinstance(item, (str, dict)):
            raise ConfigError(f"{item!r} is not a method; give a name, or `name: ...`.")
        return cls.from_dict({"name": item} if isinstance(item, str) else item)

    def relations(self) -> Iterator[str]:
        """Yield errors in the method's name, options and calibration."""
        if not self.name:
            yield "`name` is missing; name a method."
            return
        try:
            method = METHODS.load(self.name)
        except ConfigError as error:
            yield from error.faults
            return
        options = [f.name for f in dataclasses.fields(method.options)]
        for wrong in unknown_names(self.adapter, options, "option"):
            yield f"`adapter`: {wrong}"
        if self.calibration and method.traits.reads == "nothing":
            yield "`calibration` does not apply: this method does not calibrate; remove it."
            return
        try:
            calibration = CalibrationConfig(**self.calibration)
        except ConfigError as error:
            yield from error.faults
            return
        yield from calibration.faults()
        yield from _cache_faults(calibration.cache)

    def options(self, seed: int | None = None) -> Any:
        """Return the method's options record.

        Raises:
            ConfigError: the method is unknown, or an option of it is unknown or out of range.
        """
        return RunConfig(method=self.name, adapter=self.adapter, seed=seed or 0).options()

    def given(self, changed: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the options that differ from the run names' reference values.

        Args:
            changed: defaults that differed at the start of the comparison; None: current ones.
        """
        changed = self.changed_defaults() if changed is None else changed
        before = comparedefaults.METHODS.get(self.name, {})
        return comparedefaults.differing(changed | self.adapter, before)

    def changed_defaults(self) -> dict[str, Any]:
        """Return the method's defaults that differ from the run names' reference values."""
        fields = dataclasses.fields(METHODS.load(self.name).options)
        # An unset seed is the run's.
        options = {each.name: default_of(each) for each in fields if each.name != "seed"}
        return comparedefaults.differing(options, comparedefaults.METHODS.get(self.name, {}))


@dataclass(kw_only=True)
class CompareConfig(SharedConfig):
    """One comparison: methods x learning rates x seeds, the same model, rows, steps and schedule.

    Raises:
        ConfigError: values are missing or out of range; one error lists all faults.
    """

    title: str | None = None
    """Title of the report page; by default, task and model."""
    methods: list[Any] = field(default_factory=list)
    """Methods to compare: names, or items with `name`, `label`, and `adapter`, `calibration` and
    `learning_rates`, which override the common ones for this method."""
    learning_rates: Rates = field(default_factory=list)
    """Learning rates to try for every method."""
    tuning_seeds: Seeds = field(default_factory=lambda: [0, 1])
    """Seeds for choosing each method's learning rate on the validation rows."""
    final_seeds: Seeds = field(default_factory=lambda: [2, 3, 4, 5, 6])
    """Seeds for the reported runs at the chosen learning rate, scored on the test rows."""
    first_try: Annotated[list[str], Rule("folders, each once", _distinct)] = field(
        default_factory=list
    )
    """Folders of finished comparisons on other tasks. Each method also runs, with the final seeds,
    at a default learning rate: the geometric median of its best ones there."""
    validation: Validation = 0.1
    """Validation rows for choosing the learning rate: a file, or rows held out of the training
    rows: a fraction (0.1) or a number (500)."""
    validation_seed: Annotated[int, SEED] = 0
    """Seed for holding out validation rows; every run uses the same rows."""
    test_file: str | None = None
    """Test rows for the reported scores; by default, the dataset's own evaluation split."""
    metric: str | None = None
    """Metric to compare; by default, the task's first, or "loss" if it has none. Causal tasks also
    support "exact_match": the fraction of rows whose response is generated exactly."""
    answers: bool = False
    """Also score the final runs of a causal task by exact match, regardless of `metric`. It does
    not affect tuning or run names; runs that finished earlier lack this score."""
    better: Better | None = None
    """Whether higher or lower scores are better; by default, lower for losses and errors."""
    output_dir: Annotated[str, FOLDER] = "tlora-compare"
    """Folder of the comparison: one JSON file per run, the report page and the tables."""
    jobs: Annotated[int, at_least(1)] = 1
    """Number of parallel runs, each in its own process."""
    threads: Annotated[int, at_least(1)] | None = None
    """Threads per run; by default, the cores divided by `jobs`, or `cpus_per_run` on Ray."""
    engine: Engine = "local"
    """Where to run: "local" processes, or tasks on a "ray" cluster: the one at RAY_ADDRESS, the one
    on this machine, or a new one."""
    cpus_per_run: Annotated[int, at_least(1)] | None = None
    """CPUs per run on Ray; by default 1."""
    gpus_per_run: Annotated[float, Rule("a number from 0 to 1", lambda v: 0 <= v <= 1)] | None = (
        None
    )
    """GPUs per run on Ray: 1, 0, or a fraction for runs that share one; by default, 1 if the
    cluster has GPUs."""
    adapter_defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of method options to pin for this comparison, regardless of later versions; each
    applies to the methods that have the option."""
    trainer_defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of training arguments to pin for this comparison, regardless of later versions."""
    keep_adapters: bool = False
    """Keep the trained adapters of the final runs in `output_dir`; runs that finished earlier have
    none."""

    def __post_init__(self) -> None:
        if type(self.validation) is int and self.validation < 2**53:
            self.validation = float(self.validation)  # matches 500 read from a file
        super().__post_init__()
        for entry in self.entries():
            entry.options()

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields and in the methods."""
        yield from super().relations()
        if self.data.val_size is not None:
            yield "`data.val_size` does not apply to comparisons; use `validation` instead."
        yield from self._entry_faults()
        yield from self._rate_faults()
        if both := sorted({*self.tuning_seeds} & {*self.final_seeds}):
            yield (
                f"`final_seeds` and `tuning_seeds` share {both}, but reported runs need seeds that"
                " did not choose the learning rate; use different seeds."
            )
        yield from self._trainer_faults()
        yield from _cache_faults(self.calibration.cache)
        yield from self._engine_faults()

    def entries(self) -> list[MethodEntry]:
        """Return the methods with labels, learning rates and options filled in.

        A common option applies to the methods that have it.
        """
        made = []
        shared = self.adapter_defaults | self.adapter
        for entry in map(MethodEntry.of, self.methods):
            known = [f.name for f in dataclasses.fields(METHODS.load(entry.name).options)]
            common = {name: value for name, value in shared.items() if name in known}
            own = entry.calibration.items()
            made.append(
                MethodEntry(
                    name=entry.name,
                    label=entry.label or entry.name,
                    adapter=common | entry.adapter,
                    learning_rates=sorted(map(float, entry.learning_rates or self.learning_rates)),
                    calibration={k: v for k, v in own if v != getattr(self.calibration, k)},
                )
            )
        return made

    def untaken(self) -> dict[str, list[str]]:
        """Return the common options that each method lacks, by label."""
        found = {e.label: [n for n in self.adapter if n not in e.adapter] for e in self.entries()}
        return {label: names for label, names in found.items() if names}

    def run_config(self, entry: MethodEntry, learning_rate: float, seed: int) -> RunConfig:
        """Return one run of the comparison as a `tlora train` configuration."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(SharedConfig)}
        return RunConfig(
            **shared
            | {
                "method": entry.name,
                "adapter": entry.adapter,
                "calibration": dataclasses.replace(self.calibration, **entry.calibration),
                "seed": seed,
                "eval_file": self.test_file,
                "trainer": _QUIET
                | self.trainer_defaults
                | self.trainer
                | {"learning_rate": learning_rate, "save_strategy": "no"},
            }
        )

    def resolved(self) -> CompareConfig:
        """Return this comparison with every method's options and learning rates explicit."""
        items = []
        for entry in self.entries():
            options = dataclasses.asdict(entry.options())
            # An unset seed is each run's own.
            adapter = {k: v for k, v in options.items() if k != "seed" or k in entry.adapter}
            items.append(dataclasses.asdict(dataclasses.replace(entry, adapter=adapter)))
        return dataclasses.replace(self, methods=items)

    @property
    def writes_answers(self) -> bool:
        """Whether the metric is exact match."""
        return (self.metric or "").removeprefix("eval_") == EXACT_MATCH

    def _entry_faults(self) -> list[str]:
        if not self.methods:
            return ["`methods` is empty; list the methods to compare: `methods: [lora, tlora]`."]
        faults: list[str] = []
        for place, item in enumerate(self.methods, start=1):
            try:
                found = MethodEntry.of(item).faults()
            except ConfigError as error:
                found = list(error.faults)
            faults += [f"`methods`, item {place}: {wrong}" for wrong in found]
        if faults:
            return faults
        methods = [METHODS.load(MethodEntry.of(item).name) for item in self.methods]
        options = sorted({f.name for each in methods for f in dataclasses.fields(each.options)})
        faults = [
            f"`{section}`: {wrong}"
            for section in ("adapter", "adapter_defaults")
            for wrong in unknown_names(getattr(self, section), options, "option")
        ]
        return [*faults, *self._twins()]

    def _twins(self) -> Iterator[str]:
        labels, same = [], []
        for entry in self.entries():
            said = (entry.name, entry.given(), entry.calibration)
            if entry.label in labels:
                yield f"`methods`: two items have the label {entry.label!r}; give each its own."
            elif said in same:
                yield f"`methods`: {entry.label!r} duplicates an earlier item; remove it."
            labels.append(entry.label)
            same.append(said)

    def _rate_faults(self) -> Iterator[str]:
        named = [item.get("learning_rates") for item in self.methods if isinstance(item, dict)]
        own = [len(rates) for rates in named if isinstance(rates, list) and rates]
        common = [len(self.learning_rates)] * (len(own) < len(self.methods) or not own)
        if 0 in common:
            yield "`learning_rates` is []; give positive numbers, each once."
        elif len(counts := {*common, *own}) > 1:
            numbers = " and ".join(map(str, sorted(counts)))
            yield (
                f"`learning_rates`: the methods have {numbers} learning rates; give every method"
                " the same number so that tuning is fair."
            )

    def _engine_faults(self) -> Iterator[str]:
        if self.engine == "ray" and self.jobs != 1:
            yield "`jobs` does not apply to Ray; use `cpus_per_run` and `gpus_per_run`."
        for name in ("cpus_per_run", "gpus_per_run"):
            if self.engine != "ray" and getattr(self, name) is not None:
                yield f"`{name}` requires `engine: ray`; set both, or use `jobs` and `threads`."

    def _trainer_faults(self) -> list[str]:
        trainer = self.trainer_defaults | self.trainer
        schedule = trainer.get("lr_scheduler_type")
        unequal = {name: trainer.get(name) not in (None, False, "no") for name in _UNEQUAL}
        unequal["lr_scheduler_type"] = schedule in ("reduce_lr_on_plateau", "greedy")
        return [
            f"`trainer.{name}` is {trainer[name]!r}, which a comparison does not support:"
            f" {_UNEQUAL[name]}."
            for name, given in unequal.items()
            if given
        ]


_QUIET = {
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}
"""Trainer arguments unless the file sets them: show a diverged loss."""


def _cache_faults(cache: str | None) -> list[str]:
    why = "each run calibrates and counts its time; remove it"
    return [f"a comparison does not support `calibration.cache`: {why}."] if cache else []
