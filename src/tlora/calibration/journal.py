"""The file that keeps a calibration: found and used, gone on with, or written.

``calibration.safetensors`` holds the whole, and ``calibration.safetensors.unfinished`` beside it
what a run has come to; both are written aside and renamed, so that neither is ever half a file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlora.calibration.bank import MomentBank
from tlora.calibration.batches import as_batch
from tlora.calibration.collector import Collector
from tlora.calibration.distributed import ALONE, Cohort
from tlora.calibration.identity import (
    DataKey,
    Key,
    config_key,
    config_keys_that_do,
    model_key,
    statistics_kept,
)
from tlora.calibration.statistics import Calibration, calibration_file
from tlora.calibration.targets import Target
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError
from tlora.files import read_tensors, remove_abandoned, write_tensors

SAVE_SECONDS = 300.0
"""Progress is saved when this long has passed since it was last saved, between two batches."""

SAVE_PAUSES = 10.0
"""And when this many times as long has passed as saving it took."""

_KIND = "unfinished calibration"
_WAYS_OUT = "give another `cache`, or delete this file to calibrate anew"

Batch = Mapping[str, Any]


class Journal:
    """Follows one calibration, in a file where there is a ``cache``.

    Args:
        model: the base model.
        targets: the modules that are calibrated.
        config: the configuration.
        cache: the file, or a folder that has it; None: nothing is read or written.
        skip_bad_samples: whether a calibration that left some out is wanted.
        ranks: who shares the samples; the first writes the whole, each its own progress.

    Raises:
        CalibrationError: the file cannot be written where it is to be.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Iterable[Target],
        config: TLoraConfig,
        cache: str | Path | None,
        skip_bad_samples: bool,
        ranks: Cohort = ALONE,
    ) -> None:
        names = [target.name for target in targets]
        self.model = model_key(model)
        self.config = config_key(names, statistics_kept(config))
        self.configs_that_do = config_keys_that_do(names, config)
        self.skip_bad_samples = skip_bad_samples
        self.ranks = ranks
        self.data = DataKey()
        self.path = None if cache is None else calibration_file(cache)
        if self.path is not None and self.unfinished is not None:
            _make_room(self.path.parent)
            remove_abandoned(self.path)
            remove_abandoned(self.unfinished)

    @property
    def key(self) -> Key:
        """What the calibration is of, all batches read."""
        return Key(self.model, str(self.data), self.config)

    @property
    def unfinished(self) -> Path | None:
        """Where progress is saved."""
        whose = "" if self.ranks.size == 1 else f"-{self.ranks.rank}-of-{self.ranks.size}"
        return self.path and self.path.with_name(f"{self.path.name}.unfinished{whose}")

    def found(self, batches: Iterable[Batch]) -> Calibration | None:
        """Return the calibration that the file holds, None where there is no file.

        Raises:
            CalibrationError: it is of another model, other samples or another configuration.
            ArtifactError: it is damaged.
        """
        if self.path is None or not self.ranks.send(self.path.is_file(), 0):
            return None
        with self.ranks.together():
            stats = Calibration.load(self.path)
            for batch in batches:
                self.data = self._following(batch)
        self.pooled_key()
        with self.ranks.together():
            if stats.key is None:
                raise CalibrationError(f"{self.path} does not say what it is of; {_WAYS_OUT}.")
            self._compare(self.path, stats.key, self.configs_that_do)
            self._check_skipped(self.path, stats.info.get("skipped", 0))
        return stats

    def left(
        self, batches: Iterable[Batch], collector: Collector, bank: MomentBank | None
    ) -> Iterator[Batch]:
        """Yield the batches that are left to read, and save progress in between.

        Where progress was saved, the collector and the bank go on from it, and the batches that it
        holds are passed over.

        Raises:
            CalibrationError: the progress is of another model, other samples or configuration.
            ArtifactError: it is damaged.
        """
        done = self._resume(collector, bank)
        saved, pause = time.monotonic(), SAVE_SECONDS
        for batch in batches:
            following = self._following(batch)
            if following.batches > done.batches:
                yield batch
            self.data = following
            if following.batches == done.batches:
                self._compare_progress(done)
            elif following.batches > done.batches and time.monotonic() - saved >= pause:
                start = time.monotonic()
                self._save(collector, bank)
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, SAVE_PAUSES * (saved - start))
        if self.data.batches < done.batches:
            self._compare_progress(done)

    def finish(self, stats: Calibration) -> None:
        """Write the whole, where there is a file, and remove the progress."""
        if self.path is not None and self.unfinished is not None:
            with self.ranks.together():
                if self.ranks.leads:
                    stats.save(self.path)
            self.unfinished.unlink(missing_ok=True)

    def pooled_key(self) -> Key:
        """Return the key of all ranks' batches, one rank's after the other's."""
        self.data = sum(self.ranks.gather(self.data), DataKey())
        return self.key

    def _following(self, batch: Batch) -> DataKey:
        return self.data.then(as_batch(batch, torch.device("cpu")))

    def _save(self, collector: Collector, bank: MomentBank | None) -> None:
        if self.unfinished is None:
            return
        totals, values = collector.state()
        moments, shared = ({}, {}) if bank is None else bank.state()
        tensors = {f"total {name}": total for name, total in totals.items()}
        tensors |= {f"moment {name}": tensor for name, tensor in moments.items()}
        header = {"kind": _KIND, "key": self.key.to_dict(), "collector": values, "bank": shared}
        if collector.gradients is not None:
            sums, tokens = collector.gradients.state()
            tensors |= {f"gradient {name}": tensor for name, tensor in sums.items()}
            header["gradient_tokens"] = tokens
        write_tensors(self.unfinished, tensors, header)

    def _resume(self, collector: Collector, bank: MomentBank | None) -> DataKey:
        """Restore what was saved; return which batches that holds."""
        if self.unfinished is None or not self.unfinished.is_file():
            return DataKey()
        tensors, header = read_tensors(self.unfinished, _KIND)
        key = Key(**header["key"])
        done = DataKey.parse(key.data)
        self._compare(self.unfinished, Key(key.model, str(self.data), key.config), [self.config])
        self._check_skipped(self.unfinished, len(header["collector"]["skipped"]))
        collector.restore(_named(tensors, "total "), header["collector"])
        if bank is not None:
            bank.restore(_named(tensors, "moment "), header["bank"], collector.targets)
        if collector.gradients is not None:
            sums = _named(tensors, "gradient ")
            collector.gradients.restore(sums, header["gradient_tokens"], collector.targets)
        return done

    def _compare_progress(self, done: DataKey) -> None:
        if self.unfinished is not None:
            key = Key(self.model, str(done), self.config)
            self._compare(self.unfinished, key, [self.config])

    def _compare(self, path: Path, saved: Key, configs: list[str]) -> None:
        differing = []
        if saved.model != self.model:
            differing.append("model (other parameters)")
        if saved.data != str(self.data):
            differing.append("data (other samples, or in another order or other batches)")
        if saved.config not in configs:
            differing.append("config (other modules, or it lacks statistics that are needed)")
        if differing:
            verb = "differs" if len(differing) == 1 else "differ"
            raise CalibrationError(
                f"{path} is another calibration: its {' and its '.join(differing)} {verb};"
                f" {_WAYS_OUT}."
            )

    def _check_skipped(self, path: Path, count: int) -> None:
        if count and not self.skip_bad_samples:
            raise CalibrationError(
                f"{path} leaves out {count} bad samples; allow that by skip_bad_samples, or"
                f" {_WAYS_OUT}."
            )


def _named(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _make_room(folder: Path) -> None:
    """Make the folder of the cache, now and not after the passes.

    Raises:
        CalibrationError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "it is not writable"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise CalibrationError(
            f"a calibration cannot be kept in {folder}: {reason}; give `cache` another folder."
        )
