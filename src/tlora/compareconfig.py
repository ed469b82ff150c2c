"""The record of `tlora compare`: methods x learning rates x seeds on one task.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from tlora import comparedefaults
from tlora.errors import ConfigError, unknown_names
from tlora.registry import METHODS
from tlora.runconfig import CalibrationConfig, RunConfig, SharedConfig

Better = Literal["higher", "lower"]

EXACT_MATCH = "exact_match"
"""The metric for which a run's model writes its answers; all others come of predictions."""

_UNEQUAL = {
    "learning_rate": "give `learning_rates`; the rate is what is tuned",
    "auto_find_batch_size": "the batch would depend on the memory that a method takes",
    "load_best_model_at_end": "the final weights are compared, after the same steps for all",
    "save_strategy": "the runs of a comparison write no checkpoints; see `keep_adapters`",
}
_REACTIVE = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the scores of the run, so that no two runs have the same one."""

_IN_ENTRY = {
    "r": "adapter",
    "lora_alpha": "adapter",
    "target_modules": "adapter",
    "learning_rate": "learning_rates",
    "lr": "learning_rates",
    "samples": "calibration",
}


@dataclass(kw_only=True)
class MethodEntry:
    """One method of a comparison, as an item of `methods` says it."""

    name: str
    """Name of the method; see `tlora list methods`."""
    label: str = ""
    """What tables call it; by default its name."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of this method, over the common ones."""
    learning_rates: list[float] = field(default_factory=list)
    """Its learning rates, where they differ from the common ones."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """How it calibrates, over the common fields; only what differs from them."""

    def options(self, seed: int | None = None) -> Any:
        """Return the method's options record.

        Raises:
            ConfigError: the method is unknown, or an option of it is unknown or out of range.
        """
        return RunConfig(method=self.name, adapter=self.adapter, seed=seed or 0).options()

    def given(self) -> dict[str, Any]:
        """Return the options that differ from those that names are relative to."""
        options = comparedefaults.defaults_of(METHODS.load(self.name).options)
        options.pop("seed", None)  # unless it is given, it is the run's
        before = comparedefaults.METHODS.get(self.name, {})
        return comparedefaults.differing(options | self.adapter, before)


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
    learning_rates: list[float] = field(default_factory=list)
    """Rates that every method is tried at."""
    tuning_seeds: list[int] = field(default_factory=lambda: [0, 1])
    """Seeds that choose each method's learning rate, on the validation rows."""
    final_seeds: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6])
    """Seeds that run at the chosen rate and are reported, on the test rows."""
    validation: float | str = 0.1
    """Rows that choose the learning rate: a file, or what is held out of the training rows: a
    share of them (0.1) or a number of rows (500)."""
    validation_seed: int = 0
    """Seed of which training rows are held out; the same rows for every run."""
    test_file: str | None = None
    """Rows that the table reports on; by default the dataset's own evaluation split."""
    metric: str | None = None
    """Score to compare by; by default the task's first, or "loss" where it has none. Of a
    causal task also "exact_match": the share of rows whose response is written to the letter."""
    better: Better | None = None
    """Which scores are better; by default lower for losses and errors, higher for the rest."""
    output_dir: str = "tlora-compare"
    """Folder of the comparison: a JSON file a run, the page and the tables."""
    jobs: int = 1
    """Runs at a time, each in a process of its own."""
    threads: int | None = None
    """Threads of each run; by default the cores divided by `jobs`."""
    shard: str = "1/1"
    """Which part of the runs to do here, "2/3" the second of three; see docs/compare.md."""
    adapter_defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of the methods' options that this comparison keeps, whatever later versions have;
    each goes to the methods that have one of that name."""
    trainer_defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of training arguments that this comparison keeps, whatever later versions have."""
    keep_adapters: bool = False
    """Keep the trained adapters of the final runs in `output_dir`."""

    def __post_init__(self) -> None:
        if type(self.validation) is int:
            self.validation = float(self.validation)  # as a file's 500 is read
        super().__post_init__()
        for entry in self.entries():
            entry.options()

    def faults(self) -> list[str]:
        """Return what is wrong with the values, a sentence each."""
        return [
            *super().faults(),
            *self._entry_faults(),
            *self._rate_faults(),
            *self._seed_faults(),
            *self._trainer_faults(),
            *self._other_faults(),
        ]

    def entries(self) -> list[MethodEntry]:
        """Return the methods with their labels, rates and options filled in.

        A common option goes to the methods that have one of that name.
        """
        made = []
        for item in map(_as_item, self.methods):
            known = {f.name for f in dataclasses.fields(METHODS.load(item["name"]).options)}
            common = self.adapter_defaults | self.adapter
            common = {name: value for name, value in common.items() if name in known}
            made.append(
                MethodEntry(
                    name=item["name"],
                    label=str(item.get("label") or item["name"]),
                    adapter=common | (item.get("adapter") or {}),
                    learning_rates=_rates(item.get("learning_rates") or self.learning_rates),
                    calibration={
                        name: value
                        for name, value in (item.get("calibration") or {}).items()
                        if value != getattr(self.calibration, name)
                    },
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
        """Whether runs are scored by exact match."""
        return (self.metric or "").removeprefix("eval_") == EXACT_MATCH

    @property
    def part(self) -> tuple[int, int]:
        """This machine's part of the work: (number from 0, how many parts)."""
        number, _, count = self.shard.partition("/")
        return int(number) - 1, int(count)

    def _entry_faults(self) -> list[str]:
        if not self.methods:
            return ["`methods` is empty; name what to compare: `methods: [lora, tlora]`."]
        faults: list[str] = []
        options: set[str] = set()
        for place, item in enumerate(self.methods, start=1):
            where = f"`methods`, item {place}"
            found, problems = _item_faults(item, where)
            faults += problems
            options |= found
        if not faults:
            faults += [
                f"`{section}`: {fault}"
                for section in ("adapter", "adapter_defaults")
                for fault in unknown_names(getattr(self, section), sorted(options), "option")
            ]
            faults += self._twins()
        return faults

    def _twins(self) -> list[str]:
        entries = self.entries()
        labels = [entry.label for entry in entries]
        faults = [
            f"`methods`: two items are called {label!r}; give each a `label` of its own."
            for label in sorted({label for label in labels if labels.count(label) > 1})
        ]
        same = [(e.name, e.given(), e.calibration) for e in entries]
        for place, entry in enumerate(entries):
            if not faults and same[place] in same[:place]:
                faults.append(f"`methods`: {entry.label!r} says the same as an earlier item.")
        return faults

    def _rate_faults(self) -> list[str]:
        faults = []
        own = [
            item.get("learning_rates") if isinstance(item, dict) else None for item in self.methods
        ]
        lists = {
            f"`methods`, item {place}: `learning_rates`": rates
            for place, rates in enumerate(own, start=1)
            if rates
        }
        if self.learning_rates or not all(own):
            lists["`learning_rates`"] = self.learning_rates
        for where, rates in lists.items():
            good = isinstance(rates, list) and rates and all(map(_is_rate, rates))
            if not good or len(set(map(float, rates))) < len(rates):
                faults.append(f"{where} is {rates!r}; give positive numbers, each once.")
        counts = {where: len(rates) for where, rates in lists.items()} if not faults else {}
        if len({*counts.values()}) > 1:
            (few, fewest), *_, (many, most) = sorted(counts.items(), key=lambda each: each[1])
            faults.append(
                f"{few} has {fewest} and {many} {most}; whoever is tried at more is tuned better:"
                " give every method as many."
            )
        return faults

    def _seed_faults(self) -> list[str]:
        faults = []
        for name in ("tuning_seeds", "final_seeds"):
            seeds = getattr(self, name)
            whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
            if not seeds or not whole or len(set(seeds)) < len(seeds):
                faults.append(f"`{name}` is {seeds!r}; give whole numbers, 0 or more, each once.")
        if both := sorted({*self.tuning_seeds} & {*self.final_seeds}):
            faults.append(
                f"`final_seeds` and `tuning_seeds` share {both}; a seed that chose the rate"
                " cannot be reported."
            )
        return faults

    def _trainer_faults(self) -> list[str]:
        trainer = self.trainer_defaults | self.trainer
        faults = [
            f"`trainer.{name}` has no place in a comparison: {why}."
            for name, why in _UNEQUAL.items()
            if trainer.get(name) not in (None, False, "no")
        ]
        schedule = trainer.get("lr_scheduler_type")
        if schedule in _REACTIVE:
            faults.append(
                f"`trainer.lr_scheduler_type` is {schedule!r}, which follows the scores of a run;"
                " choose one that is the same for all."
            )
        return faults

    def _other_faults(self) -> list[str]:
        faults = _cache_faults(self.calibration.cache, "`calibration.cache`")
        if isinstance(self.validation, (int, float)) and not (
            0 < self.validation < 1 or (self.validation >= 1 and self.validation % 1 == 0)
        ):
            faults.append(
                f"`validation` is {self.validation!r}; give a file, a share below 1 or a number"
                " of rows."
            )
        for name, least in (("jobs", 1), ("threads", 1), ("validation_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"`{name}` is {value!r}; give a whole number, {least} or more.")
        number, slash, count = self.shard.partition("/")
        digits = slash and number.isdigit() and count.isdigit()
        if not digits or not 1 <= int(number) <= int(count):
            faults.append(f"`shard` is {self.shard!r}; give i/n: 1/2 and 2/2 for two machines.")
        if not self.output_dir:
            faults.append("`output_dir` is empty; name a folder.")
        return faults


_QUIET = {
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}
"""What the trainer of a run does unless the file says otherwise: a diverged loss is shown."""


def _as_item(item: Any) -> dict[str, Any]:
    return {"name": item} if isinstance(item, str) else dict(item)


def _item_faults(item: Any, where: str) -> tuple[set[str], list[str]]:
    """Return the names of the options that the item's method has, and what is wrong with it."""
    if not isinstance(item, (str, dict)):
        return set(), [f"{where} is {item!r}; give the name of a method, or `name: ...`."]
    item = _as_item(item)
    known = [f.name for f in dataclasses.fields(MethodEntry)]
    faults = []
    for name in item:
        if name in known:
            continue
        if name == "trainer":
            why = "the training is the same for all; only `learning_rates` may differ."
            faults.append(f"{where}: `trainer` has no place in it: {why}")
        elif name in _IN_ENTRY:
            faults.append(f"{where}: there is no field `{name}`; put it in `{_IN_ENTRY[name]}`.")
        else:
            faults += [f"{where}: {fault}" for fault in unknown_names([name], known, "field")]
    if not isinstance(item.get("name"), str):
        return set(), [*faults, f"{where} has no `name`; name a method."]
    faults += [
        f"{where}: `{section}` is {item[section]!r}; give `{what}: value` pairs."
        for section, what in (("adapter", "option"), ("calibration", "field"))
        if not isinstance(item.get(section) or {}, dict)
    ]
    if faults:
        return set(), faults
    try:
        method = METHODS.load(item["name"])
    except ConfigError as error:
        return set(), [f"{where}: {fault}" for fault in error.faults]
    names = [f.name for f in dataclasses.fields(method.options)]
    faults += [
        f"{where}: `adapter`: {fault}"
        for fault in unknown_names(item.get("adapter") or {}, names, "option")
    ]
    faults += [
        f"{where}: {fault}" for fault in _calibration_faults(item.get("calibration") or {}, method)
    ]
    return set(names), faults


def _calibration_faults(given: dict[str, Any], method: Any) -> list[str]:
    """Return what is wrong with the calibration that one method is given."""
    known = [f.name for f in dataclasses.fields(CalibrationConfig)]
    if unknown := unknown_names(given, known, "field"):
        return [f"`calibration`: {fault}" for fault in unknown]
    if given and method.traits.reads == "nothing":
        return ["`calibration` has no place in it: the method reads no rows before training."]
    faults = CalibrationConfig(**given).faults()
    return faults + _cache_faults(given.get("cache"), "`calibration.cache`")


def _cache_faults(cache: str | None, name: str) -> list[str]:
    why = "each run calibrates, and the time it takes is counted"
    return [f"{name} has no place in a comparison: {why}."] if cache else []


def _is_rate(value: Any) -> bool:
    try:
        return 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False


def _rates(values: list[Any]) -> list[float]:
    return sorted(map(float, values))
