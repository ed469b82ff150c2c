"""The first try: each method at a default learning rate that other comparisons choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlora.compare import defaults
from tlora.compare.compareconfig import CompareConfig, MethodEntry
from tlora.compare.comparefolder import CompareFolder, tail
from tlora.compare.experiment import row_files
from tlora.compare.ratecurve import geometric_median
from tlora.compare.trials import Comparison, saved
from tlora.errors import ArtifactError, ConfigError, Faults

_SIZES = {
    *("r", "lora_alpha", "init_r", "target_r"),
    *("exclude_modules", "modules_to_save", "memory_budget"),
}
"""Options that fit a method to a model and a machine; a method is the same whatever they are."""


def method_of(
    entry: MethodEntry, changed: Mapping[str, dict[str, Any]] | None = None
) -> tuple[str, dict[str, Any], dict[str, Any], float | None]:
    """Return what is equal for two entries that are one method, whatever their rank.

    These are name, options, calibration and alpha / r, because a smaller scale wants a higher rate.

    Args:
        entry: the entry.
        changed: `Comparison.changed` of its comparison.
    """
    given = entry.given(None if changed is None else changed.get(entry.name, {}))
    known = defaults.METHODS.get(entry.name, {}) | given
    rank, alpha = known.get("r", known.get("target_r")), known.get("lora_alpha")
    options = {name: value for name, value in given.items() if name not in _SIZES}
    return entry.name, options, entry.calibration, alpha / rank if alpha and rank else None


def best_elsewhere(config: CompareConfig) -> dict[str, list[tuple[str, float]]]:
    """Return by label the folders of `first_try` that have the method, and its best rate there.

    If a folder has it more than once, at several ranks, the geometric median counts.

    Raises:
        ArtifactError, ConfigError: a folder holds no comparison, one of the same rows, or one
            whose tuning runs are not finished; all faults at once.
    """
    entries = config.entries()
    found: dict[str, list[tuple[str, float]]] = {entry.label: [] for entry in entries}
    own = _rows(config, row_files(config))
    faults = Faults("first_try")
    for path in config.first_try:
        with faults:
            folder = CompareFolder(path)
            other = saved(folder)
            if own & _rows(other.config, folder.read()["shared"]["files"]):
                raise ConfigError(
                    f"{path} has rows of this comparison; a default learning rate has to come from"
                    " other tasks: leave the folder out.",
                    where="first_try",
                )
            for entry in entries:
                if rates := _best(other, folder, method_of(entry)):
                    found[entry.label].append((tail(path), geometric_median(rates)))
    faults.raise_found()
    return found


def _rows(config: CompareConfig, files: Mapping[str, str | None]) -> set[Any]:
    """Return what identifies the rows of a comparison: digests of files, or the dataset's name."""
    dataset = (config.task, config.data.dataset, config.data.dataset_config)
    return {*files.values(), None if "train_file" in files else dataset} - {None}


def _best(other: Comparison, folder: CompareFolder, method: tuple[Any, ...]) -> list[float]:
    """Return the best rates of the entries that are ``method``."""
    entries = [e for e in other.config.entries() if method_of(e, other.changed) == method]
    for entry in entries:
        if any(folder.record(trial.name) is None for trial in other.tuning_of(entry)):
            raise ArtifactError(
                f"{folder.path}: tuning runs of {entry.label} are missing; finish that comparison,"
                " or leave the folder out of `first_try`."
            )
    chosen = [other.chosen(entry, folder) for entry in entries]
    return [rate for rate in chosen if rate is not None]
