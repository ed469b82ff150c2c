"""The record of `tlora compare`: methods x learning rates x seeds on one task.

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
        "a file, a share below 1 or a number of rows",
        lambda v: _names_a_file(v) if isinstance(v, str) else 0 < v < 1 or (v >= 1 and v % 1 == 0),
    ),
]


def _names_a_file(text: str) -> bool:
    """Whether a text is no number: `-1` and `nan` are mistyped ones, not files."""
    try:
        float(text)
    except ValueError:
        return True
    return False


def _distinct(values: list[Any]) -> bool:
    return len(set(values)) == len(values)


EXACT_MATCH = "exact_match"
"""The metric for which a run's model writes its answers; all others come of predictions."""

_UNEQUAL = {
    "learning_rate": "give `learning_rates`; the rate is what is tuned",
    "auto_find_batch_size": "the batch would depend on the memory that a method takes",
    "lr_scheduler_type": "it follows the scores of a run; choose one that is the same for all",
    "load_best_model_at_end": "the final weights are compared, after the same steps for all",
    "save_strategy": "the runs of a comparison write no checkpoints; see `keep_adapters`",
}


@dataclass(kw_only=True)
class MethodEntry(Section):
    """One method of a comparison, as an item of `methods` says it."""

    name: str = ""
    """Name of the method; see `tlora list methods`."""
    label: str = ""
    """What tables call it; by default its name."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of this method, over the common ones."""
    learning_rates: Rates = field(default_factory=list)
    """Its learning rates, where they differ from the common ones."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """How it calibrates, over the common fields; only what differs from them."""

    @classmethod
    def of(cls, item: Any) -> MethodEntry:
        """Return the entry that an item of `methods` stands for.

        Raises:
            ConfigError: it is neither a name nor a mapping, or names something unknown.
        """
        if not isinstance(item, (str, dict)):
            raise ConfigError(f"{item!r} is no method; give a name, or `name: ...`.")
        return cls.from_dict({"name": item} if isinstance(item, str) else item)

    def relations(self) -> Iterator[str]:
        """Yield what is wrong with the names of the method, its options and its calibration."""
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
            yield "`calibration` has no place here: the method reads no rows before training."
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
        """Return the options that differ from those that names are relative to.

        Args:
            changed: defaults that differed when the comparison was started; None: today's.
        """
        changed = self.changed_defaults() if changed is None else changed
        before = comparedefaults.METHODS.get(self.name, {})
        return comparedefaults.differing(changed | self.adapter, before)

    def changed_defaults(self) -> dict[str, Any]:
        """Return the method's defaults that differ from those that names are relative to."""
        fields = dataclasses.fields(METHODS.load(self.name).options)
        # Unless a seed is given, it is the run's.
        options = {each.name: default_of(each) for each in fields if each.name != "seed"}
        return comparedefaults.differing(options, comparedefaults.METHODS.get(self.name, {}))


@dataclass(kw_only=True)
class CompareConfig(SharedConfig):
    """One comparison: methods x learning rates x seeds, the same model, rows, steps and schedule.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    title: str | None = None
    """Headline of the page; by default task and model."""
    methods: list[Any] = field(default_factory=list)
    """What is compared: names, or items of `name`, `label`, `adapter` and `calibration` (of this
    method, over the common ones) and `learning_rates` (where they differ from the common ones)."""
    learning_rates: Rates = field(default_factory=list)
    """Learning rates that every method is tried at."""
    tuning_seeds: Seeds = field(default_factory=lambda: [0, 1])
    """Seeds that choose each method's learning rate, on the validation rows."""
    final_seeds: Seeds = field(default_factory=lambda: [2, 3, 4, 5, 6])
    """Seeds that run at the chosen learning rate and are reported, on the test rows."""
    validation: Validation = 0.1
    """Rows that choose the learning rate: a file, or what is held out of the training rows: a
    share of them (0.1) or a number of rows (500)."""
    validation_seed: Annotated[int, SEED] = 0
    """Seed of which training rows are held out; the same rows for every run."""
    test_file: str | None = None
    """Rows that the table reports on; by default the dataset's own evaluation split."""
    metric: str | None = None
    """Score to compare by; by default the task's first, or "loss" where it has none. Of a
    causal task also "exact_match": the share of rows whose response is written to the letter."""
    answers: bool = False
    """Also score the final runs of a causal task by exact match, whatever `metric` is. Nothing is
    chosen by it, and no run is another for it: runs that finished before have no such score."""
    better: Better | None = None
    """Which scores are better; by default lower for losses and errors, higher for the rest."""
    output_dir: Annotated[str, FOLDER] = "tlora-compare"
    """Folder of the comparison: a JSON file a run, the page and the tables."""
    jobs: Annotated[int, at_least(1)] = 1
    """Runs at a time, each in a process of its own."""
    threads: Annotated[int, at_least(1)] | None = None
    """Threads of each run; by default the cores divided by `jobs`, on Ray `cpus_per_run`."""
    engine: Engine = "local"
    """Where the runs go: "local" processes, or tasks of a "ray" cluster: of RAY_ADDRESS, of this
    machine, or of a new one."""
    cpus_per_run: Annotated[int, at_least(1)] | None = None
    """CPUs of each run on Ray; by default 1."""
    gpus_per_run: Annotated[float, Rule("a number from 0 to 1", lambda v: 0 <= v <= 1)] | None = (
        None
    )
    """GPUs of each run on Ray, 1, 0, or a fraction where runs share one; by default 1 if the
    cluster has GPUs."""
    adapter_defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of the methods' options that this comparison keeps, whatever later versions have;
    each goes to the methods that have one of that name."""
    trainer_defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of training arguments that this comparison keeps, whatever later versions have."""
    keep_adapters: bool = False
    """Keep the trained adapters of the final runs in `output_dir`; of runs that finished before it
    was given there are none."""

    def __post_init__(self) -> None:
        if type(self.validation) is int and self.validation < 2**53:
            self.validation = float(self.validation)  # as a file's 500 is read
        super().__post_init__()
        for entry in self.entries():
            entry.options()

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields, and in the methods' own."""
        yield from super().relations()
        if self.data.val_size is not None:
            yield "`data.val_size` has no place in a comparison; `validation` holds rows out."
        yield from self._entry_faults()
        yield from self._rate_faults()
        if both := sorted({*self.tuning_seeds} & {*self.final_seeds}):
            yield (
                f"`final_seeds` and `tuning_seeds` share {both}; a seed that chose the"
                " learning rate cannot be reported."
            )
        yield from self._trainer_faults()
        yield from _cache_faults(self.calibration.cache)
        yield from self._engine_faults()

    def entries(self) -> list[MethodEntry]:
        """Return the methods with their labels, rates and options filled in.

        A common option goes to the methods that have one of that name.
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
        """Return by label the common options that a method does not have."""
        found = {e.label: [n for n in self.adapter if n not in e.adapter] for e in self.entries()}
        return {label: names for label, names in found.items() if names}

    def run_config(self, entry: MethodEntry, learning_rate: float, seed: int) -> RunConfig:
        """Return one run of the comparison, in the words of `tlora train`."""
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
        """Return this comparison with every method's options and rates written out."""
        items = []
        for entry in self.entries():
            options = dataclasses.asdict(entry.options())
            # A seed that was not given is each run's own.
            adapter = {k: v for k, v in options.items() if k != "seed" or k in entry.adapter}
            items.append(dataclasses.asdict(dataclasses.replace(entry, adapter=adapter)))
        return dataclasses.replace(self, methods=items)

    @property
    def writes_answers(self) -> bool:
        """Whether runs are compared by exact match."""
        return (self.metric or "").removeprefix("eval_") == EXACT_MATCH

    def _entry_faults(self) -> list[str]:
        if not self.methods:
            return ["`methods` is empty; name what to compare: `methods: [lora, tlora]`."]
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
                yield f"`methods`: two items are called {entry.label!r}; give each its own `label`."
            elif said in same:
                yield f"`methods`: {entry.label!r} says the same as an earlier item."
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
                f"`learning_rates`: the methods have {numbers} of them; give every method the same"
                " number, so that tuning is fair."
            )

    def _engine_faults(self) -> Iterator[str]:
        if self.engine == "ray" and self.jobs != 1:
            yield "`jobs` has no place on Ray; `cpus_per_run` and `gpus_per_run` say what fits."
        for name in ("cpus_per_run", "gpus_per_run"):
            if self.engine != "ray" and getattr(self, name) is not None:
                yield f"`{name}` is for `engine: ray`; give both, or `jobs` and `threads`."

    def _trainer_faults(self) -> list[str]:
        trainer = self.trainer_defaults | self.trainer
        schedule = trainer.get("lr_scheduler_type")
        unequal = {name: trainer.get(name) not in (None, False, "no") for name in _UNEQUAL}
        unequal["lr_scheduler_type"] = schedule in ("reduce_lr_on_plateau", "greedy")
        return [
            f"`trainer.{name}` is {trainer[name]!r}, which has no place in a comparison:"
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
"""What the trainer of a run does unless the file says otherwise: a diverged loss is shown."""


def _cache_faults(cache: str | None) -> list[str]:
    why = "each run calibrates, and the time it takes is counted"
    return [f"`calibration.cache` has no place in a comparison: {why}."] if cache else []
